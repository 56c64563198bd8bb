"""Scoring rules of series, by which a neural SDE is trained without a critic."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def energy_score(
    data: Float[Array, "num ..."],
    generated: Float[Array, "samples ..."],
    mask: Bool[Array, "num ..."] | None = None,
) -> Float[Array, ""]:
    r"""How far generated samples are from data: the energy score of the generator,
    which is least, on average, if it has the law of the data.

    With data $x_1, \dots, x_R$ and samples $y_1, \dots, y_B$ it is

    $\frac{1}{R B} \sum_{i, j} |x_i - y_j|
    - \frac{1}{2 B (B - 1)} \sum_{j \neq k} |y_j - y_k|,$

    without bias for $\mathbb{E} |x - y| - \frac{1}{2} \mathbb{E} |y - y'|$, with
    independent samples $y$ and $y'$. That is more than
    $\frac{1}{2} \mathbb{E} |x - x'|$, which it has if both laws are one, by half of the
    energy distance of the two laws. So its gradient in parameters of the generator is
    one of that distance, and no critic has to be trained:

    ```python
    @eqx.filter_value_and_grad
    def loss(generator, data, key):
        return energy_score(data, jax.vmap(generator)(jr.split(key, 128)))
    ```

    **Arguments:**

    - `data`: along the first axis, of any shape, such as `(times, channels)`, and of a
        floating point dtype. It should have been scaled: $|\cdot|$ is the root of the
        sum of squares over all entries.
    - `generated`: at least two independent samples, of the same shape and dtype.
    - `mask`: true for what is known of `data`; the rest of it is not read, and may be
        NaN. Then distances are those of what is known of $x_i$, also the ones of the
        $y_j$ and $y_k$ that it is compared with. Which entries are known must not
        depend on their values. By default, all.

    **Returns:**

    A number, in the unit of the data. It can be negative in a small sample, and is NaN
    if a number that it takes is.

    **Raises:**

    `ValueError` for shapes or dtypes that do not go together.

    **Cost:**

    With $d$ entries in each, $(R + B) B d$ multiplications, in matrix products.
    Distances below about $10^{-3}$ times the size of what is compared ($10^{-7}$ in
    float64) are not told from zero. With a mask, $2 R B d$, one by one, and so many
    numbers in memory; of the pairs $j \neq k$ each $x_i$ takes $B$. Pass `mask=None`
    where all is known.

    Source: Gneiting and Raftery, *Strictly Proper Scoring Rules, Prediction, and
    Estimation*, Journal of the American Statistical Association 2007, Section 4.3.
    """
    _check_samples("energy_score", data, generated, mask)
    x, y = (z.reshape(len(z), -1) for z in (data, generated))
    if mask is None:
        return _score(x, y)
    known = mask.reshape(x.shape)
    return _score_of_own(jnp.where(known, x, 0), jnp.where(known[:, None], y, 0))


class WindowedEnergyScore(eqx.Module):
    r"""How far generated series are from data: energy scores of windows of both, and of
    whole series.

    A window is `window` times of the series, one after the other or with a stride
    between them; strides are as likely in $[1, 2)$ as in $[2, 4)$, and the first and
    last times count about as much as those between. Values in a window are whitened:
    less their mean in the data, and divided by the Cholesky factor of their covariance.
    Thereby a change from one time to the next weighs as much as a value, though it may
    be a hundred times smaller, and it shows in the score if it is wrong. The whole
    series are divided by the standard deviation of each channel. The score is

    $\frac{1}{W} \sum_{w = 1}^{W} S\big(L_w^{-1} (x_w - \mu_w),\,
    L_w^{-1} (y_w - \mu_w)\big) + \alpha\, S(x / \sigma,\, y / \sigma)$

    for `num_windows` random windows, the same for all series, where $S$ is the
    [`diffrax_sde_adjoint.energy_score`][].

    ```python
    score = WindowedEnergyScore(data)  # all of it, for means and covariances

    @eqx.filter_value_and_grad
    def loss(generator, batch, key):
        sample_key, score_key = jr.split(key)
        generated = jax.vmap(generator)(jr.split(sample_key, 128))
        return score(batch, generated, score_key)
    ```

    Windows of two times are enough to tell two Markov processes apart, and no window
    that is shorter than the series is for all other processes; the whole series are. A
    sample tells little of the law of a long vector, so the latter alone learns slowly.

    The least value is not zero, but about what other data have in place of
    `generated`: compare with that. Changes weigh so much that differences in values at
    one time are small in it, and are learned late. For the Ornstein-Uhlenbeck processes
    of the examples, other series of the process score 2.104, and 2.106 if each is
    shifted so that starts spread a third as much, where one evaluation varies by 0.02.
    So look at values at some times, too.

    **Attributes:**

    - `scale`: the standard deviation of each channel.
    - `mean`: of the data at each time, by the scale.
    - `covariance`: of all times and channels with one another, by the scale, and with
        what is added to its diagonal.
    """

    scale: Float[Array, " channels"]
    mean: Float[Array, "times channels"]
    covariance: Float[Array, "times channels times channels"]
    window: int = eqx.field(static=True)
    num_windows: int = eqx.field(static=True)
    weight_of_whole: float = eqx.field(static=True)

    def __init__(
        self,
        data: Float[Array, "num ..."],
        mask: Bool[Array, "num ..."] | None = None,
        *,
        window: int = 8,
        num_windows: int = 16,
        weight_of_whole: float = 0.125,
        regularisation: float = 1e-4,
    ):
        r"""**Arguments:**

        - `data`: series for training, of shape `(num, times, channels)`, from which
            means and covariances are found.
        - `mask`: true for what is known of `data`, by default all. Each covariance is
            that of the series in which both entries are known, so there must be some.
        - `window`: the times of a window, at least two and at most those of `data`.
        - `num_windows`: those of an evaluation, at least one. Zero leaves them out.
        - `weight_of_whole`: $\alpha$, of whole series. Zero leaves them out.
        - `regularisation`: this part of the variance of a channel is added to the
            variance of each of its values; above zero. What is smaller in the data (by
            default, an error of measurement of one percent) need not be matched.

        The covariance has $(\text{times} \cdot \text{channels})^2$ entries.
        """
        if data.ndim != 3 or not jnp.issubdtype(data.dtype, jnp.floating):
            raise ValueError(
                "`WindowedEnergyScore(data)` takes an array of floating point numbers, "
                "of shape `(num, times, channels)`, but its shape and dtype are "
                f"{data.shape} and {data.dtype}. For one channel, pass "
                "`data[..., None]`."
            )
        _check_mask("WindowedEnergyScore", data, mask)
        num, times, channels = data.shape
        if num_windows > 0 and not 2 <= window <= times:
            raise ValueError(
                f"`WindowedEnergyScore(window={window})` is not at least two, and at "
                f"most the number of times of `data`, {times}."
            )
        if min(num_windows, weight_of_whole) < 0 or num_windows == 0 == weight_of_whole:
            raise ValueError(
                "`WindowedEnergyScore` takes `num_windows` and `weight_of_whole` of at "
                "least zero, and not both zero."
            )
        if not regularisation > 0:
            raise ValueError("`WindowedEnergyScore` takes a positive `regularisation`.")
        known = jnp.ones_like(data) if mask is None else mask.astype(data.dtype)
        data = data if mask is None else jnp.where(mask, data, 0)
        num_known = jnp.sum(known, axis=(0, 1))
        centre = jnp.sum(data, axis=(0, 1)) / num_known
        data = known * (data - centre)
        self.scale = jnp.sqrt(jnp.sum(data**2, axis=(0, 1)) / num_known)
        mean = jnp.sum(data / self.scale, axis=0) / jnp.sum(known, axis=0)
        data = (known * (data / self.scale - mean)).reshape(num, -1)
        known = known.reshape(num, -1)
        covariance = _product(data.T, data) / _product(known.T, known)
        if mask is not None:
            # It is not one of any process, as each entry is of other series.
            values, vectors = jnp.linalg.eigh(covariance)
            covariance = _product(vectors * jnp.maximum(values, 0), vectors.T)
        covariance = covariance + regularisation * jnp.eye(
            len(covariance), dtype=data.dtype
        )
        rounding = 100 * float(jnp.finfo(data.dtype).eps) * jnp.abs(centre)
        is_right = jnp.all(jnp.isfinite(covariance)) & jnp.all(self.scale > rounding)
        covariance = eqx.error_if(
            covariance,
            jnp.invert(is_right),
            "`WindowedEnergyScore(data, mask)` needs data that is finite where it is "
            "known, no channel that is constant, and for any two entries of the series "
            "some in which both are known.",
        )
        self.mean = centre / self.scale + mean
        self.covariance = covariance.reshape(times, channels, times, channels)
        self.window = window
        self.num_windows = num_windows
        self.weight_of_whole = weight_of_whole

    def __call__(
        self,
        data: Float[Array, "num ..."],
        generated: Float[Array, "samples ..."],
        key: PRNGKeyArray,
        mask: Bool[Array, "num ..."] | None = None,
    ) -> Float[Array, ""]:
        r"""**Arguments:**

        - `data`, `generated`, `mask`: as those of
            [`diffrax_sde_adjoint.energy_score`][], of shapes `(num, times, channels)`
            and `(samples, times, channels)`. With a mask, what is known of a series in
            a window is whitened.
        - `key`: for the windows.

        **Returns:**

        A number without unit.

        **Cost:**

        For $R$ series of data and $B$ generated ones, $(R + B) B$ times the number of
        values in all windows and in the series; with a mask, $R B$ times the sum of
        their squares in each window. For 128 series of data, 64 generated ones, 40
        times and 3 channels, a gradient takes 12 to 15 times as long with a mask, on
        two CPU cores. So pass `mask=None` where all is known.
        """
        _check_samples("WindowedEnergyScore", data, generated, mask)
        if data.shape[1:] != self.mean.shape or data.dtype != self.mean.dtype:
            raise ValueError(
                "`WindowedEnergyScore` was made with series of shape "
                f"{self.mean.shape} and dtype {self.mean.dtype}, but is called with "
                f"those of shape {data.shape[1:]} and dtype {data.dtype}."
            )
        data, generated = data / self.scale, generated / self.scale
        score = jnp.zeros((), data.dtype)
        if self.num_windows > 0:
            keys = jr.split(key, self.num_windows)
            of_window = lambda key: self._score_of_window(data, generated, key, mask)
            score = jnp.mean(jax.vmap(of_window)(keys))
        if self.weight_of_whole > 0:
            score = score + self.weight_of_whole * energy_score(data, generated, mask)
        return score

    def _score_of_window(self, data, generated, key, mask) -> Float[Array, ""]:
        times = random_window(key, len(self.mean), self.window)
        mean = self.mean[times]
        size = mean.size
        covariance = self.covariance[times][:, :, times].reshape(size, size)
        flat = lambda x: (x[:, times] - mean).reshape(len(x), size)
        x, y = flat(data), flat(generated)
        if mask is None:
            whiten = _inverse_factor(covariance).T
            return _score(_product(x, whiten), _product(y, whiten))

        def whitened(x, mask):
            """What is known of a series, and the same of each generated one."""
            both = mask[:, None] & mask
            among_known = jnp.where(both, covariance, jnp.eye(size, dtype=x.dtype))
            whiten = _inverse_factor(among_known).T
            known = lambda x: _product(jnp.where(mask, x, 0), whiten)
            return known(x), known(y)

        return _score_of_own(*jax.vmap(whitened)(x, mask[:, times].reshape(-1, size)))


def random_window(key: PRNGKeyArray, times: int, window: int) -> Int[Array, " window"]:
    """Indices of `window` of so many times, with one stride between them."""
    stride_key, start_key = jr.split(key)
    longest = (times - 1) // (window - 1)
    stride = jnp.exp(jr.uniform(stride_key) * jnp.log(longest + 1.0))
    stride = jnp.clip(stride.astype(int), 1, longest)
    length = (window - 1) * stride
    # A start may be outside by half of a window, and is then moved to the end.
    margin = length // 2
    starts = times - length
    start = jr.randint(start_key, (), -margin, starts + margin)
    return jnp.clip(start, 0, starts - 1) + stride * jnp.arange(window)


def _check_samples(name: str, data, generated, mask) -> None:
    floating = jnp.issubdtype(data.dtype, jnp.floating)
    if data.shape[1:] != generated.shape[1:] or data.dtype != generated.dtype:
        raise ValueError(
            f"`{name}` compares `data` and `generated` of one shape but for the first "
            f"axis, and of one dtype. They are of shape {data.shape} and dtype "
            f"{data.dtype}, and of shape {generated.shape} and dtype {generated.dtype}."
        )
    if data.ndim == 0 or not floating or len(data) < 1 or len(generated) < 2:
        raise ValueError(
            f"`{name}` takes arrays of floating point numbers, with at least one series"
            " of `data` and two of `generated` along the first axis. They are of shape "
            f"{data.shape} and {generated.shape}, and of dtype {data.dtype}."
        )
    _check_mask(name, data, mask)


def _check_mask(name: str, data, mask) -> None:
    if mask is not None and (mask.shape != data.shape or mask.dtype != jnp.bool_):
        raise ValueError(
            f"`{name}(..., mask=...)` takes an array of booleans, of the shape of "
            f"`data`, {data.shape}. It is of shape {mask.shape} and dtype {mask.dtype}."
        )


def _score(
    x: Float[Array, "num size"], y: Float[Array, "samples size"]
) -> Float[Array, ""]:
    # Products of what is far from zero would lose digits. One sample may be far off.
    centre, median = lax.stop_gradient((jnp.mean(x, axis=0), jnp.median(y, axis=0)))
    between = jnp.mean(_distances(x - centre, y - centre))
    apart = jnp.invert(jnp.eye(len(y), dtype=bool))
    within = jnp.sum(_distances(y - median, y - median, apart))
    return between - 0.5 * within / (len(y) * (len(y) - 1))


def _score_of_own(
    x: Float[Array, "num size"], y: Float[Array, "num samples size"]
) -> Float[Array, ""]:
    """The score of what is known of each of the data, with the same of the samples."""
    num, samples, _ = y.shape
    shift = 1 + jnp.arange(num) % (samples - 1)
    other = (jnp.arange(samples) + shift[:, None]) % samples
    others = jnp.take_along_axis(y, other[..., None], axis=1)
    length = lambda x: _root(jnp.sum(x**2, axis=-1), 0)
    return jnp.mean(length(x[:, None] - y)) - 0.5 * jnp.mean(length(y - others))


def _distances(
    x: Float[Array, "num size"],
    y: Float[Array, "samples size"],
    where: Bool[Array, "num samples"] | bool = True,
) -> Float[Array, "num samples"]:
    of_x, of_y = (jnp.sum(z**2, axis=1) for z in (x, y))
    sizes = of_x[:, None] + of_y
    square = sizes - 2 * _product(x, y.T)
    rounding = 8 * float(jnp.finfo(x.dtype).eps) * lax.stop_gradient(sizes)
    return _root(jnp.where(where, square, 0), rounding)


def _root(
    square: Float[Array, "..."], rounding: Float[Array, "..."] | int
) -> Float[Array, "..."]:
    """The root of what is more than rounding, and zero, also its derivative, of what is
    not. What is not a number stays so.
    """
    is_zero = square - rounding <= 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _product(x: Float[Array, "*a b"], y: Float[Array, "b c"]) -> Float[Array, "*a c"]:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _inverse_factor(covariance: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of its Cholesky factor."""
    factor = jnp.linalg.cholesky(covariance)
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    return jsp.linalg.solve_triangular(factor, identity, lower=True)
