// SPDX-License-Identifier: Apache-2.0
// Releases the GIL.
#pragma once

#include <Python.h>
#include <unistd.h>

#include <cstddef>  // defines __GLIBCXX__

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace fastadam::bind {

// Releases the GIL until the end of the scope. If the interpreter is shutting down by then, the thread (a daemon)
// sleeps until the process ends, as in Python 3.14. Older versions end it by an unwinding that a destructor would turn
// into std::terminate(), and that would release Python objects without the GIL.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
#if defined(__GLIBCXX__) && PY_VERSION_HEX < 0x030e0000
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      while (true) pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastadam::bind
