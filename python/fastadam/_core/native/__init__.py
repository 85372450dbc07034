"""Arrays, gradients and variables on their way to the native code; ``plan`` is the way in."""
