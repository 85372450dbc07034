/* SPDX-License-Identifier: Apache-2.0
 * Uses fastadam_cuda.h without a device. tests/test_cuda_c_interface.py uses it with one. */
#include <fastadam_cuda.h>
#include <stdio.h>

int main(void) {
  fastadam_cuda_plan* plan = NULL;
  printf("devices %d\n", (int)fastadam_cuda_device_count());
  printf("status %d %s\n", (int)fastadam_cuda_plan_create(0, NULL, &plan), fastadam_cuda_error());
  return fastadam_cuda_plan_destroy(plan);
}
