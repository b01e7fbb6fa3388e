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

// Divides `rows` rows, at least one, into as few groups of at most R as possible, and calls
// visit(count, first) for each: `count` rows from `first` on. The sizes differ by at most one,
// since a group of one row reads as many weights as a full group.
template <int R, class Visit>
inline void in_groups(int64_t rows, Visit visit) {
  const int64_t groups = (rows + R - 1) / R;
  // A division of 32 bits: one of 64 bits takes up to 90 cycles on older CPUs.
  const int64_t size = static_cast<uint32_t>(rows) / static_cast<uint32_t>(groups);
  int64_t larger = rows - size * groups;  // groups that have a row more
  for (int64_t first = 0; first < rows; larger--) {
    const int64_t count = size + (larger > 0);
    with_constant<R>(count, first, visit);
    first += count;
  }
}

}  // namespace
