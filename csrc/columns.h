// How many vectors are multiplied at a time, and by how many matrices.
#pragma once

namespace octavo {

constexpr int kColumns = 8;
constexpr int kTogether = 3;

}  // namespace octavo
