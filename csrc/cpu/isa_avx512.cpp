#define PEFTKERN_ISA avx512
#include "isa.h"
