// Takes the place of CUDA's header of this name.
#pragma once

#include "cuda_emulation.h"
