/* What inference takes of the element-wise kernels of a training step. */
#pragma once
#include <stdint.h>

/* y = silu(gate) * up; backward: grad_gate and grad_up from the gradient of y. */
typedef struct {
    const float *gate, *up;
    float *y;
    const float *gradient;
    float *grad_gate, *grad_up;
    int64_t count;
} Swiglu;

/* On all threads; y may be gate. */
void ernie_swiglu(const Swiglu *swiglu);
