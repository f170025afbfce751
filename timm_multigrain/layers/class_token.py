"""The class token as a pooling: what DINOv2, DINOv3 and CLIP were trained to describe an image by."""
import torch
import torch.nn as nn


class ClassToken(nn.Module):
    """The first token of an (N, L, C) map.

    Args:
        input_fmt: 'NLC'.
        flatten: Return (N, C), otherwise (N, 1, C).
        num_prefix_tokens: Leading tokens that are not positions, the class token and registers.

    Raises:
        ValueError: A map of another format, or without a class token.
    """

    def __init__(self, input_fmt: str = 'NLC', flatten: bool = True, num_prefix_tokens: int = 1):
        super().__init__()
        if input_fmt != 'NLC' or num_prefix_tokens < 1:
            raise ValueError(f'A class token is one of tokens: a map of format {input_fmt!r} with {num_prefix_tokens} '
                             'prefix tokens does not have one.')
        self.flatten = flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.flatten else x[:, :1]

    def extra_repr(self) -> str:
        return f'flatten={self.flatten}'
