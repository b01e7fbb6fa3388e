// Rows in groups: the kernels keep the sums of a few rows in registers, for which the number of
// these rows must be known at compile time.

#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// Calls visit(count, first) with `count`, 1 to R, as a std::integral_constant, whose value is known
// at compile time.
template <int R, class Visit>
inline void with_constant(int64_t count, int64_t first, Visit visit) {
  if (count == R) return visit(std::integral_constant<int, R>{}, first);
  if constexpr (R > 1) with_constant<R - 1>(count, first, visit);
}

// Divides `rows` rows into as few groups of at most R as possible, of sizes that differ by at most
// one (a group of one row reads as many weights as a full group), and calls visit(count, first) for
// each: `count` rows from `first` on.
template <int R, class Visit>
inline void in_groups(int64_t rows, Visit visit) {
  const int64_t groups = (rows + R - 1) / R;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = rows * g / groups;
    with_constant<R>(rows * (g + 1) / groups - first, first, visit);
  }
}

}  // namespace
