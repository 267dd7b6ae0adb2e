/* Between stored numbers and panels for large products. */
#pragma once
#include "linear.h"

/* `width` numbers of a bf16, int8 or int4 matrix as bf16, from `column` on, at which a group of int4 begins. Codes of
   int8 come without their scale, which bf16 then holds exactly. */
void widen_to_bf16(const Matrix *matrix, int64_t row, int64_t column, int64_t width, uint16_t *result);
