// A stand-in for NVIDIA's driver library, on a machine without a GPU: the entry points that Triton's launcher calls.
// It reads of a binary which parameters a kernel has, refuses what the driver refuses, runs nothing, counts launches,
// and between stand_in_record(1) and stand_in_record(0) keeps of each what the driver was given.
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { MAX_PARAMS = 128, MAX_ATTRIBUTES = 8 };

typedef struct {
  const uint8_t *image;  // the caller's, who asks for its functions before it lets go of it
} Module;

typedef struct {
  uint32_t count;
  uint16_t sizes[MAX_PARAMS];
} Function;  // never freed: a handle names one function for as long as the process lives

// What Python reads: record.py has the same fields.
typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared_memory, attributes;
  int32_t attribute_ids[MAX_ATTRIBUTES], attribute_values[MAX_ATTRIBUTES];
  uint32_t params;
  uint16_t sizes[MAX_PARAMS];
  uint8_t *bytes;  // the parameters, one behind the other
} Launch;

// What a tensor map holds here, in the driver's 128 bytes. Triton clears bit 21 of word 1, of small tensors: no swizzle's.
typedef struct {
  uint64_t address;
  uint8_t rank, type, swizzle, interleave, l2_promotion, fill, unused[2];
  uint64_t shape[5], strides[4];
  uint32_t box[5];
} TensorMap;
_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static struct { int capability, units, shared_memory; } device = {90, 132, 227 * 1024};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t total;
static int recording;
static Launch *launches;
static size_t recorded, room;

// ------------------------------------------------------------------------------------------------ the tests' own

void stand_in_device(int capability, int units, int shared_memory) {
  device.capability = capability;
  device.units = units;
  device.shared_memory = shared_memory;
}

uint64_t stand_in_count(void) { return __atomic_load_n(&total, __ATOMIC_RELAXED); }

void stand_in_record(int on) {
  pthread_mutex_lock(&lock);
  if (on) {
    for (size_t i = 0; i < recorded; ++i) free(launches[i].bytes);
    recorded = 0;
  }
  recording = on;
  pthread_mutex_unlock(&lock);
}

size_t stand_in_recorded(void) { return recorded; }

const Launch *stand_in_launch(size_t i) { return &launches[i]; }

// ----------------------------------------------------------------------------------------- device, context, stream

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "an error of the stand-in";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *found, int ordinal) {
  *found = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice of) {
  *context = (CUcontext)&device;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *found) {
  *found = device.capability;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice of) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.units; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.shared_memory + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1000; break;  // clocks and bus widths, which nobody here reads
  }
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------- modules, functions

// The parameters of kernel `name`: the records KPARAM_INFO of its section .nv.info.<name>.
static int read_parameters(const uint8_t *image, const char *name, Function *function) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 0;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  static const char prefix[] = ".nv.info.";
  for (int i = 0; i < header->e_shnum; ++i) {
    const char *own = names + sections[i].sh_name;
    if (strncmp(own, prefix, sizeof prefix - 1) != 0 || strcmp(own + sizeof prefix - 1, name) != 0) continue;
    const uint8_t *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at + 4 <= end) {  // format, attribute, and a value of two bytes, or (format 4) that many bytes behind it
      uint16_t length;
      memcpy(&length, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {  // KPARAM_INFO: index, ordinal, offset, and the size in the last word's high bits
        uint16_t ordinal;
        uint32_t packed;
        memcpy(&ordinal, at + 8, 2);
        memcpy(&packed, at + 12, 4);
        if (ordinal >= MAX_PARAMS) return 0;
        function->sizes[ordinal] = packed >> 18;
        if (function->count <= ordinal) function->count = ordinal + 1;
      }
      at += 4 + (at[0] == 4 ? length : 0);
    }
    return 1;
  }
  return 0;
}

CUresult cuModuleLoadData(CUmodule *found, const void *image) {
  Module *module = calloc(1, sizeof *module);
  module->image = image;
  *found = (CUmodule)module;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  Function *function = calloc(1, sizeof *function);
  if (!read_parameters(((Module *)module)->image, name, function)) return CUDA_ERROR_NOT_FOUND;
  *found = (CUfunction)function;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// -------------------------------------------------------------------------------------- launches, tensor maps

static void keep(const CUlaunchConfig *config, const Function *function, void **params) {
  if (recorded == room) launches = realloc(launches, (room = 2 * room + 64) * sizeof *launches);
  Launch *launch = memset(&launches[recorded++], 0, sizeof *launch);
  launch->function = (uintptr_t)function;
  launch->stream = (uintptr_t)config->hStream;
  const uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(launch->grid, grid, sizeof grid);
  memcpy(launch->block, block, sizeof block);
  launch->shared_memory = config->sharedMemBytes;
  launch->attributes = config->numAttrs;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    launch->attribute_ids[i] = config->attrs[i].id;
    memcpy(&launch->attribute_values[i], &config->attrs[i].value, sizeof(int32_t));
  }
  size_t size = 0, at = 0;
  launch->params = function->count;
  memcpy(launch->sizes, function->sizes, sizeof launch->sizes);
  for (uint32_t i = 0; i < function->count; ++i) size += function->sizes[i];
  launch->bytes = malloc(size + 1);
  for (uint32_t i = 0; i < function->count; at += function->sizes[i++])
    memcpy(launch->bytes + at, params[i], function->sizes[i]);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  const uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (threads == 0 || threads > 1024 || config->sharedMemBytes > (unsigned)device.shared_memory ||
      config->gridDimX == 0 || config->gridDimX > INT32_MAX || config->gridDimY == 0 || config->gridDimY > UINT16_MAX ||
      config->gridDimZ == 0 || config->gridDimZ > UINT16_MAX || config->numAttrs > MAX_ATTRIBUTES)
    return CUDA_ERROR_INVALID_VALUE;
  __atomic_add_fetch(&total, 1, __ATOMIC_RELAXED);
  if (__atomic_load_n(&recording, __ATOMIC_RELAXED)) {
    pthread_mutex_lock(&lock);
    keep(config, (const Function *)function, params);
    pthread_mutex_unlock(&lock);
  }
  return CUDA_SUCCESS;
}

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

static unsigned span_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_NONE: return UINT32_MAX;
    default: return 128;
  }
}

// Refuses what the driver's manual says that the driver refuses of a map without interleave.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                CUtensorMapFloatOOBfill fill) {
  const unsigned size = bytes_of(type);
  if ((uintptr_t)address % 16 || rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      box[0] * size % 16 || box[0] * size > span_of(swizzle))
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap made = {(uintptr_t)address, rank, type, swizzle, interleave, l2_promotion, fill, {0}, {0}, {0}, {0}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (shape[i] == 0 || shape[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    made.shape[i] = shape[i];
    made.box[i] = box[i];
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < shape[0] * size) return CUDA_ERROR_INVALID_VALUE;
    made.strides[i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
