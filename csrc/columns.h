// How many vectors are multiplied at a time.
#pragma once

namespace octavo {

constexpr int kColumns = 8;

}  // namespace octavo
