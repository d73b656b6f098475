#define PEFTKERN_ISA avx2
#include "isa.h"
