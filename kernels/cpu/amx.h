// AMX: the tile registers of a thread, and the instructions that use them. Where the compiler has
// no AMX, has_amx returns false.
//
// The instructions are written as assembly, because GCC's intrinsics take tile numbers as literals
// only, not as template parameters.

#pragma once

#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layout.h"

namespace {

#ifdef __AMX_INT8__

// The tile registers: sums of two strips, activations of up to 16 rows, weights of two strips. The
// CPU renames tiles, so a tile may be loaded while earlier instructions still read it. Loading
// zeros is four times as fast as the instruction tilezero.
enum Amx { kSums0, kSums1, kRows, kWeights0, kWeights1 };

// Asks Linux for the tile registers, once for each process. Returns whether it grants them.
bool has_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// The operand of the instruction ldtilecfg, whose fields Intel defines. Its constructor configures
// this thread's tiles, and its destructor releases them. input_bytes: bytes of a row of the tile
// kRows; weight_rows: rows of a tile of weights. The defaults are those of amx_int8.h: 32 inputs of
// each of 16 rows, and 32 inputs, four to a row, of 16 outputs.
struct alignas(kLine) AmxTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine};  // of a row
  uint8_t rows[16] = {kStrip, kStrip, kStrip, kStrip, kStrip};

  AmxTiles(uint16_t input_bytes = kChunk, uint8_t weight_rows = kChunk / 4) {
    bytes[kRows] = input_bytes, rows[kWeights0] = rows[kWeights1] = weight_rows;
    if (has_amx()) asm volatile("ldtilecfg %0" ::"m"(*this));
  }
  ~AmxTiles() { if (has_amx()) asm volatile("tilerelease"); }
};

// Loads a tile, whose rows lie `stride` bytes apart.
template <Amx TILE>
void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
// Stores a tile, row after row of 64 bytes.
template <Amx TILE>
void amx_store(void* to) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" ::"i"(TILE), "r"(to), "r"(kLine) : "memory");
}

// Adds to a tile of sums the products of signed activation bytes (kRows) and unsigned weight bytes.
template <Amx SUMS, Amx WEIGHTS>
void amx_int8_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(kRows), "i"(WEIGHTS));
}

// Adds to a tile of sums the products of bfloat16 weights and activations (kRows). The sums are
// (output, row): here the weights are the left operand.
template <Amx SUMS, Amx WEIGHTS>
void amx_bf16_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(WEIGHTS), "i"(kRows));
}

#else

bool has_amx() { return false; }
struct AmxTiles {};

#endif

}  // namespace
