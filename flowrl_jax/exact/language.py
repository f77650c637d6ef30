"""A language small enough to be listed: each response, its tokens and its probability.

A response is a string of symbols 1 to S that ends with an end token, 0, or is cut at L tokens. The
strings of at most L symbols are the nodes of a tree, numbered level by level, so that symbol s
leads from node i to node i S + s. Nodes above the last level are the places where a token is drawn;
each node is a response too: ended there, or, on the last level, cut.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.errors import require

END = 0
_MOST_RESPONSES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Language:
    """All strings over a few symbols up to a length.

    Attributes:
        symbols: S, the end token aside.
        length: L, tokens that a response may have.
    """

    symbols: int
    length: int

    def __post_init__(self):
        require(
            self.symbols >= 2 and self.length >= 1,
            f"a language of {self.symbols} symbols and {self.length} tokens: give 2 and 1 or more",
        )
        require(
            self.symbols**self.length <= _MOST_RESPONSES,
            f"a language of {self.symbols} symbols and {self.length} tokens has more than"
            f" {_MOST_RESPONSES} responses: make it smaller",
        )

    @property
    def places(self) -> int:
        """Nodes at which a token is drawn."""
        return sum(self.symbols**depth for depth in range(self.length))

    @property
    def responses(self) -> int:
        """How many there are."""
        return self.places + self.symbols**self.length

    @property
    def depths(self) -> np.ndarray:
        """`[responses]`, symbols of each."""
        levels = range(self.length + 1)
        return np.repeat(np.arange(self.length + 1), [self.symbols**depth for depth in levels])

    @property
    def sizes(self) -> np.ndarray:
        """`[responses]`, tokens of each, the end token among them."""
        return np.minimum(self.depths + 1, self.length)

    def paths(self) -> tuple[np.ndarray, np.ndarray]:
        """The way to each response.

        Returns:
            Places and tokens, `[responses, L]` int each; 0 behind a response's end.
        """
        nodes, depths = np.arange(self.responses), self.depths
        places = np.zeros((self.responses, self.length), np.int32)
        tokens = np.zeros((self.responses, self.length), np.int32)
        ended = depths < self.length
        places[nodes[ended], depths[ended]] = nodes[ended]
        for back in range(1, self.length + 1):
            rows = depths >= back
            above = (nodes - 1) // self.symbols
            column = depths[rows] - back
            places[rows, column] = above[rows]
            tokens[rows, column] = (nodes - 1)[rows] % self.symbols + 1
            nodes = np.maximum(above, 0)
        return places, tokens

    def log_probability(self, logprobs: jax.Array) -> jax.Array:
        """Adds up tokens to responses.

        Args:
            logprobs: `[..., places, S + 1]`, of the tokens at each place, the end token first.

        Returns:
            `[..., responses]`; their exponentials sum to 1.
        """
        reached = jnp.zeros((*logprobs.shape[:-2], 1), logprobs.dtype)
        found, first = [], 0
        for depth in range(self.length):
            here = logprobs[..., first : first + self.symbols**depth, :]
            first += self.symbols**depth
            found.append(reached + here[..., END])
            reached = (reached[..., None] + here[..., 1:]).reshape(*reached.shape[:-1], -1)
        return jnp.concatenate([*found, reached], axis=-1)
