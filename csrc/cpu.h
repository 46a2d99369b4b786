// Instruction sets of this processor and of this build.
#pragma once

namespace octavo {

// Widest usable one of OCTAVO_ISA_*; asked once, then remembered.
int best_isa();

}  // namespace octavo
