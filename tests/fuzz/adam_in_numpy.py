"""Adam in NumPy float32, from the equations in the order of operations of TensorFlow's kernels; nothing of fastadam.

Of one float32 variable or several: dense gradients and IndexedSlices (`training_ops.cc`, Keras's `optimizer_v2/adam.py`),
AMSGrad, decay, decoupled weight decay, the three ways to clip, accumulation, moving averages (Keras 3), and lazy rows.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32
MODES = ("dense", "deferred", "lazy")


class Options:
    """What the reference needs to know of the optimizer."""

    def __init__(self, rng):
        self.learning_rate, self.beta_1, self.beta_2, self.epsilon = 0.01, 0.9, 0.999, 1e-7
        self.amsgrad = bool(rng.random() < 0.3)
        self.decay = float(rng.choice([0, 0, 0.1]))
        self.weight_decay = rng.choice([None, None, 0.1])
        self.clipvalue = rng.choice([None, None, 0.5])
        self.clipnorm = rng.choice([None, None, 1.0])
        self.global_clipnorm = rng.choice([None, 1.5]) if self.clipnorm is None else None
        self.use_ema = bool(rng.random() < 0.4)
        self.ema_momentum = 0.75
        self.loss_scale_factor = rng.choice([None, None, 64.0])
        self.gradient_accumulation_steps = rng.choice([None, None, 2, 3])
        self.sparse_update = str(rng.choice(MODES))
        overwrites = self.use_ema and self.sparse_update != "lazy" and rng.random() < 0.3
        self.ema_overwrite_frequency = 3 if overwrites else None

    @property
    def per_step(self):
        return self.gradient_accumulation_steps or 1


class State:
    """A variable of the reference: its values, its slots, and what has been accumulated."""

    def __init__(self, value):
        self.value = value.copy()
        self.slots = {}
        self.sum, self.rows = None, None  # rows: which of a lazy cycle's gradients had; None for all

    def slot(self, name, start=None):
        if name not in self.slots:
            self.slots[name] = np.zeros_like(self.value) if start is None else start.copy()
        return self.slots[name]


class Reference:
    def __init__(self, options, variables):
        self.o, self.states, self.calls = options, [State(w) for w in variables], 0

    # ---- a call of apply_gradients ---------------------------------------------------------------------------------

    def apply(self, gradients):
        """Gradients by the place of their variable: an array, or a pair of values and indices."""
        o = self.o
        if o.gradient_accumulation_steps is None:
            self.calls += 1
            self.step(gradients, self.calls, 1 / (o.loss_scale_factor or 1))
            return
        if self.calls % o.per_step == 0:
            for state in self.states:
                state.sum = state.rows = None
        for place, gradient in gradients.items():
            self.add(self.states[place], gradient)
        self.calls += 1
        if self.calls % o.per_step == 0:
            sums = {place: state.sum for place, state in enumerate(self.states) if state.sum is not None}
            self.step(sums, self.calls // o.per_step, 1 / ((o.loss_scale_factor or 1) * o.per_step))
            for state in self.states:
                state.sum = None

    def add(self, state, gradient):
        if state.sum is None:
            state.sum, state.rows = np.zeros_like(state.value), set()
        if isinstance(gradient, tuple):
            values, indices = gradient
            total = np.zeros_like(state.value)
            for row, value in zip(indices, values, strict=True):
                total[row] += value
            state.sum += total
            if state.rows is not None:
                state.rows |= set(indices.tolist())
        else:
            state.sum, state.rows = state.sum + gradient, None

    def step(self, gradients, t, scale):
        o, one = self.o, F32(1)
        factors = self.factors(gradients, scale)
        step, rate = F32(t), F32(o.learning_rate)
        if o.decay > 0:
            rate = rate / (one + F32(o.decay) * F32(t - 1))
        b1, b2 = F32(o.beta_1), F32(o.beta_2)
        root, correction = np.sqrt(one - b2**step), one - b1**step
        keep = one - F32(o.weight_decay or 0) * rate
        numbers = b1, b2, rate * root / correction, rate * (root / correction), keep
        for place, gradient in gradients.items():
            self.update(self.states[place], gradient, F32(factors[place]), numbers, t)

    def clipped(self, values, scale):
        bound = F32(np.inf if self.o.clipvalue is None else self.o.clipvalue / scale)
        return np.clip(values, -bound, bound)

    def factors(self, gradients, scale):
        o, squares = self.o, {}
        for place, gradient in gradients.items():
            values = gradient[0] if isinstance(gradient, tuple) else gradient
            squares[place] = (self.clipped(values, scale).astype(np.float64) ** 2).sum()
        self.scale = scale
        if o.clipnorm is not None:
            bounds = {place: (o.clipnorm, np.sqrt(square) * scale) for place, square in squares.items()}
        else:
            norm = np.sqrt(sum(squares.values())) * scale
            bounds = dict.fromkeys(squares, (np.inf if o.global_clipnorm is None else o.global_clipnorm, norm))
        return {place: (bound / norm if norm > bound else 1.0) * scale for place, (bound, norm) in bounds.items()}

    def update(self, state, gradient, factor, numbers, t):
        o, one = self.o, F32(1)
        b1, b2, alpha, row_alpha, keep = numbers
        m, v = state.slot("m"), state.slot("v")
        vhat = state.slot("vhat") if o.amsgrad else None
        average = state.slot("average", state.value) if o.use_ema else None
        moved = slice(None)  # which rows
        if isinstance(gradient, tuple):
            values, indices = self.clipped(gradient[0], self.scale) * factor, gradient[1]
            g = np.zeros_like(state.value)
            for row, value in zip(indices, values, strict=True):
                g[row] += value
            touched = np.unique(indices)
            if o.sparse_update == "lazy":
                moved = touched
            m[moved] *= b1
            v[moved] *= b2
            m[touched] += g[touched] * (one - b1)
            v[touched] += g[touched] * g[touched] * (one - b2)
            alpha = row_alpha
        else:
            g = self.clipped(gradient, self.scale) * factor
            if o.sparse_update == "lazy" and state.sum is gradient and state.rows is not None:
                moved = np.array(sorted(state.rows), np.int64)
            m[moved] += (g[moved] - m[moved]) * (one - b1)
            v[moved] += (g[moved] * g[moved] - v[moved]) * (one - b2)
        second = v[moved]
        if vhat is not None:
            second = vhat[moved] = np.maximum(vhat[moved], second)
        state.value[moved] = state.value[moved] * keep - m[moved] * alpha / (np.sqrt(second) + F32(o.epsilon))
        if average is not None:
            momentum = F32(o.ema_momentum if t > 1 else 0)
            average[moved] = momentum * average[moved] + (one - momentum) * state.value[moved]
            if o.ema_overwrite_frequency is not None and t % o.ema_overwrite_frequency == 0:
                state.value[...] = average

    # ---- other calls -----------------------------------------------------------------------------------------------

    def resize(self, place, value, rows):
        old, new = self.states[place], State(value)
        for name, slot in old.slots.items():
            fresh = value if name == "average" else np.zeros_like(value)
            new.slots[name] = np.where((rows >= 0)[:, None], slot[rows], fresh).astype(F32)
        if old.sum is not None:
            new.sum = np.where((rows >= 0)[:, None], old.sum[rows], 0).astype(F32)
            new.rows = None if old.rows is None else {i for i, row in enumerate(rows) if row in old.rows}
        self.states[place] = new

    def reset(self, place, rows):
        state = self.states[place]
        at = slice(None) if rows is None else rows
        for name, slot in state.slots.items():
            slot[at] = state.value[at] if name == "average" else 0
        if state.sum is not None:
            state.sum[at] = 0  # it still takes part in the step
