"""The head of a MultiGrain model: pooling, whitening when it is fitted, dropout and the linear classifier."""
import torch
import torch.nn as nn

from timm_multigrain.layers import GeM, Whitening, create_pool, is_multigrain_pool

from .trunk import FeatureMap

__all__ = ['MultiGrainHead']

_FIXED = {'avg': 1., 'max': float('inf')}


class MultiGrainHead(nn.Module):
    """Pool the map to one embedding and classify it.

    The embedding (``pre_logits=True``) is taken before dropout, which belongs to the classifier.

    Args:
        feature_map: Format and channels of the trunk's map.
        num_classes: Rows of the classifier, 0 for none.
        global_pool: 'gem', 'gem4', 'gem_learn', 'avg' (GeM with p = 1), 'max' (p = inf), 'mac', 'spoc', 'rmac', 'crow',
            or '' for the map itself.
        gem_p: Exponent of GeM, inf allowed.
        learn_p: Train the exponent.
        per_channel_p: One exponent a channel.
        gem_eps: Smallest value that enters the power.
        drop_rate: Dropout before the classifier.
        whitening: Components of the whitened embedding, None without whitening.

    Shape:
        The trunk's map to (N, num_classes), or (N, embed_dim) with ``pre_logits=True`` or without classes.
    """

    def __init__(
            self,
            feature_map: FeatureMap,
            num_classes: int,
            global_pool: str = 'gem',
            gem_p: float = 3.0,
            learn_p: bool = False,
            per_channel_p: bool = False,
            gem_eps: float = 1e-6,
            drop_rate: float = 0.,
            whitening: int | None = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.feature_map = feature_map
        self.gem_args = dict(p=gem_p, learn_p=learn_p, per_channel=per_channel_p, eps=gem_eps)
        dd = {'device': device, 'dtype': dtype}
        self.pool = self._create_pool(global_pool, **dd)
        channels = feature_map.channels
        self.whitening = nn.Identity() if whitening is None else Whitening(channels, whitening, **dd)
        self.embed_dim = channels if whitening is None else whitening
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Identity()
        self.reset_fc(num_classes, **dd)

    def _create_pool(self, global_pool: str, device=None, dtype=None) -> nn.Module:
        fmt = self.feature_map
        if global_pool and global_pool not in _FIXED and not is_multigrain_pool(global_pool):
            raise ValueError(
                f"Unknown global_pool {global_pool!r} for a MultiGrain model: choose 'gem', 'gem4', 'gem_learn', "
                "'avg', 'max', 'mac', 'spoc', 'rmac', 'crow', or '' for the unpooled map.")
        self.global_pool = global_pool
        self.pooled = bool(global_pool)  # the whitening and the classifier work on pooled embeddings only
        if not global_pool:
            return nn.Identity()
        if global_pool in _FIXED:
            self.gem_args.update(p=_FIXED[global_pool], learn_p=False, per_channel=False)
        elif global_pool != 'gem':
            pool = create_pool(global_pool, input_fmt=fmt.format, num_prefix_tokens=fmt.prefix_tokens, persistent=True)
            if not isinstance(pool, GeM):
                return pool.to(device=device)
            self.gem_args.update(p=pool.init_p, learn_p=pool.learn_p, per_channel=False)
        self.global_pool = 'gem'  # 'gem4', 'avg' and the like are GeM with that exponent
        args = self.gem_args
        return GeM(
            p=args['p'], learn_p=args['learn_p'], num_channels=fmt.channels if args['per_channel'] else None,
            eps=args['eps'], input_fmt=fmt.format, num_prefix_tokens=fmt.prefix_tokens).to(device=device)

    def reset_pool(self, global_pool: str, device=None, dtype=None) -> None:
        """Change the pooling. 'gem' keeps an existing GeM, and restores a removed one with its p."""
        if global_pool != self.global_pool:
            if isinstance(self.pool, GeM) and not self.pool.per_channel:
                self.gem_args.update(p=self.pool.value())
            self.pool = self._create_pool(global_pool, device=device, dtype=dtype).train(self.training)

    def reset_fc(self, num_classes: int, device=None, dtype=None) -> None:
        """Give the head a fresh classifier of ``num_classes`` rows, none for 0.

        Raises:
            ValueError: The number is negative, or the map is not pooled.
        """
        if num_classes < 0:
            raise ValueError(f'num_classes={num_classes} is negative: use 0 for a model without classifier.')
        if num_classes and not self.pooled:
            raise ValueError(f"global_pool='' gives the map itself, not an input for {num_classes} classes: "
                             'use num_classes=0 or a pooling.')
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)
        self.fc.train(self.training)

    def set_whitening(self, components: int, num_classes: int, device=None, dtype=None) -> None:
        """Insert a whitening of so many components, to be loaded or fitted, and a classifier of that width."""
        self.whitening = Whitening(self.feature_map.channels, components, device=device, dtype=dtype)
        self.embed_dim = components
        self.reset_fc(num_classes, device=device, dtype=dtype)

    def set_channels(self, channels: int) -> None:
        """Take a map of so many channels from now on (a pruned trunk's); a whitening of other channels goes."""
        self.feature_map = self.feature_map._replace(channels=channels)
        self.whitening = nn.Identity()
        self.embed_dim = channels

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.pool(x)
        if self.pooled:
            x = self.whitening(x)
        return x if pre_logits else self.classify(x)

    def classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """(N, embed_dim) embedding to (N, num_classes) logits."""
        return self.fc(self.drop(embedding))
