#define PEFTKERN_ISA baseline
#include "isa.h"
