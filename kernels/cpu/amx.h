#pragma once

#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layout.h"

namespace {

#ifdef __AMX_INT8__
// What AMX's tiles hold: sums of two strips, eight rows, weights of two strips. A tile is renamed:
// it may be loaded while instructions before still need what was in it. To load zeros is four times
// as fast as to let tilezero write them.
enum Amx { kSums0, kSums1, kRows, kWeights0, kWeights1 };

bool has_amx() {  // Linux lends the tiles to a process that asks
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

struct alignas(kLine) AmxTiles {  // ready for this thread while the object lives
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine};  // of a row
  uint8_t rows[16] = {kStrip, kStrip, kStrip, kStrip, kStrip};

  AmxTiles(uint16_t input_bytes = kChunk, uint8_t weight_rows = kChunk / 4) {
    bytes[kRows] = input_bytes, rows[kWeights0] = rows[kWeights1] = weight_rows;
    if (has_amx()) asm volatile("ldtilecfg %0" ::"m"(*this));
  }
  ~AmxTiles() { if (has_amx()) asm volatile("tilerelease"); }
};

template <Amx TILE>
void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <Amx TILE>
void amx_store(void* to) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" ::"i"(TILE), "r"(to), "r"(kLine) : "memory");
}
template <Amx SUMS, Amx WEIGHTS>
void amx_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(kRows), "i"(WEIGHTS));
}

template <Amx SUMS, Amx WEIGHTS>
void amx_dense_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(WEIGHTS), "i"(kRows));
}

#else
bool has_amx() { return false; }
struct AmxTiles {};
#endif

}  // namespace
