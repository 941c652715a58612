// What the matrix product hands to its kernels. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include "activation.h"
#include "panel.h"

namespace glide_fast {

struct LinearSource {
    const float* data;
    int64_t row, column;  // strides
    int64_t depth;        // columns; 0 where there is no second source
};

// output [rows, columns] = activation([sources side by side] B + bias) + residual.
struct LinearProblem {
    int64_t rows, columns;
    LinearSource sources[2];
    const float* b;     // panels [depth, PANEL], or B itself, whose rows of columns are dense
    int64_t b_row;      // stride of a panel's rows
    int64_t b_panel;    // stride of panels
    const float* bias;  // [columns] or null
    Activation activation;
    const float* residual;  // [rows, columns] or null
    float* output;
    int64_t block_rows;  // rows of a task
    int64_t chunk;       // of the depth at a time, at most
    int64_t panels;

    int64_t depth() const { return sources[0].depth + sources[1].depth; }
};

struct LinearKernels {
    int64_t (*scratch)(const LinearProblem&);
    // Tasks: panels of blocks of rows.
    void (*multiply)(const LinearProblem&, int64_t begin, int64_t end, float* scratch);
    // Tasks: panels of a matrix [depth, columns] with strides.
    void (*pack)(const LinearSource&, int64_t columns, int64_t rows, float* packed, int64_t begin,
                 int64_t end);
};

}  // namespace glide_fast
