"""What a fused attention has to offer so that one chain of autograd functions can differentiate it.

Five operators make attention and its first two derivatives, each a function of plain tensors that builds no
graph. With s the scale, products elementwise unless between matrices, and sums over the keys a query sees:

    S = s Q Kᵀ      P = exp(S - lse)      O = P V

``forward`` yields O and lse, the row-wise log-sum-exp of S, which the others take back so that none has to
search for it again. Half-precision inputs are computed in float32. So is O, which the caller rounds: D and m
O below would carry its rounding, times the size of the values, into every derivative. lse is float32, or
float64 for float64.

Shapes, with ``heads`` a multiple of ``kv_heads`` and consecutive query heads sharing a key-value head:
query (batch, heads, queries, dim), key (batch, kv_heads, keys, dim), value (batch, kv_heads, keys,
value_dim), out as value but for the queries, lse (batch, heads, queries). Any strides.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from theria.attention.call import CausalAlignment, diagonal_offset

Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]
Value = Float[Tensor, "batch kv_heads keys value_dim"]
Out = Float[Tensor, "batch heads queries value_dim"]
LogSumExp = Float[Tensor, "batch heads queries"]


@dataclass(frozen=True)
class Band:
    """Scale of the scores, and the diagonal band of keys that each query sees.

    Query i stands at key i + ``offset``. With ``causal`` it sees no later key, and with a ``window`` only the
    key it stands at and the ``window - 1`` before.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: int | None = None

    @classmethod
    def of_call(
        cls,
        *,
        scale: float,
        is_causal: bool,
        window: int | None,
        causal_alignment: CausalAlignment,
        queries: int,
        keys: int,
    ) -> "Band":
        """The band of a call to ``scaled_dot_product_attention``."""
        offset = diagonal_offset(queries, keys, causal_alignment) if is_causal else 0
        return cls(scale, is_causal, offset, window)


class Gradients(NamedTuple):
    """Cotangents of query, key and value."""

    query: Query
    key: Key
    value: Value


class Curvature(NamedTuple):
    """Cotangents of query, key, value and of the output's cotangent."""

    query: Query
    key: Key
    value: Value
    out_cotangent: Out


@runtime_checkable
class AttentionOperators(Protocol):
    """A complete set of operators; instances hold no state and compare by identity."""

    def forward(self, query: Query, key: Key, value: Value, band: Band) -> tuple[Out, LogSumExp]:
        """O = P V, in float32 for half precision, and lse.

        A row that sees no key has O = 0 and lse = +inf, for which P is 0 and not NaN.
        """
        ...

    def vjp(
        self, query: Query, key: Key, value: Value, out: Out, lse: LogSumExp, cotangent: Out, band: Band
    ) -> Gradients:
        """Gradient of <dO, O>, with dO the cotangent.

        dP = dO Vᵀ, D = rowsum(dO O), dS = P (dP - D);
        dQ = s dS K, dK = s dSᵀ Q, dV = Pᵀ dO.
        """
        ...

    def jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        band: Band,
    ) -> Out:
        """Derivative of O along the tangents (a, b, c) of query, key and value.

        T = s (a Kᵀ + Q bᵀ), m = rowsum(P T);
        U = [P T] V - m O + P c.
        """
        ...

    def hvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        cotangent: Out,
        cotangents: Gradients,
        band: Band,
    ) -> Curvature:
        """Gradient of <a, dQ> + <b, dK> + <c, dV>, the cotangents (a, b, c) of what ``vjp`` gives.

        With dP, D, dS as there, T, m and U as in ``jvp``:
        G = dO cᵀ, e = rowsum(dO U), W = P [G + (dP - D) T - m dP - (e - m D)];
        gQ = s (dS b + W K), gK = s (dSᵀ a + Wᵀ Q), gV = [P (T - m)]ᵀ dO, gdO = U.

        The first three are also the Hessian of <dO, O> times (a, b, c), whichever way it is taken, and the
        last is the jvp along (a, b, c).
        """
        ...

    def second_jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        others: Gradients,
        band: Band,
    ) -> Out:
        """Derivative of U along other tangents (a', b', c') of query, key and value; of (a, b, c) it is none.

        With T and m as in ``jvp``, T' and m' of the other tangents, and R = s (a b'ᵀ + a' bᵀ):
        W = P [(T - m) (T' - m') + R];
        D²O = W V - rowsum(W) O + [P (T - m)] c' + [P (T' - m')] c.

        The second derivative of O, the same for tangents and others exchanged.
        """
        ...
