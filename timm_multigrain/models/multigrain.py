"""MultiGrain: one image embedding for classes, instances and copies.

Berman, Jégou, Vedaldi, Kokkinos, Douze, "MultiGrain: a unified image embedding for classes and instances",
arXiv 1902.05509. A trunk, generalized-mean (GeM) pooling, and a linear classifier on the pooled embedding; the same
embedding, L2-normalised, is the retrieval descriptor. Training it for both is MultiGrainTask's part.
"""
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import get_model_traits

from timm_multigrain.layers import GeM, Whitening, create_pool, is_multigrain_pool, l2_normalize
from timm_multigrain.layers.functional import is_traced

from .trunk import FeatureMap, InputSizes, create_trunk, find_input_sizes, model_cfg, probe_trunk, sharing_copy
from .weights import checkpoint_filter_fn, is_multigrain, unwrapped  # timm looks the first up beside the class

_OWN_POOLS = ('trunk', 'map')  # those of the trunk's own head, weights included


class MultiGrainHead(nn.Module):
    """Pool the map to one embedding, whiten it where a whitening is fitted, and classify it.

    Arguments as of `MultiGrain`; ``gem_args`` are p, learn_p, per_channel and eps of a GeM.
    """

    def __init__(
            self, feature_map: FeatureMap, num_classes: int, global_pool: str, gem_args: dict[str, Any],
            drop_rate: float = 0., whitening: int | None = None, device=None, dtype=None):
        super().__init__()
        self.gem_args = gem_args
        self.pool = self.channels = None
        self.reset_pool(global_pool, device, feature_map=feature_map)
        self.whitening = nn.Identity()
        if whitening is not None:
            self.whitening = Whitening(self.channels, whitening, device=device, dtype=dtype)
            self.embed_dim = whitening
        self.drop = nn.Dropout(drop_rate)
        self.reset_fc(num_classes, device, dtype)

    def reset_pool(self, global_pool: str, device=None, dtype=None, feature_map: FeatureMap | None = None) -> None:
        """Change the pooling. 'gem' keeps an existing GeM, and restores a removed one with its p.

        The map is another one with a ``feature_map``. A whitening of other channels goes.
        """
        if feature_map is None and global_pool == self.global_pool:
            return
        args, fmt = self.gem_args, feature_map or self.feature_map
        prefix, _, name = global_pool.rpartition('+')
        name = {'avg': 'gem1', 'max': 'geminf'}.get(name, name)
        own = global_pool in _OWN_POOLS
        if prefix not in ('', 'cls') or not (is_multigrain_pool(name) or global_pool == '' or own):
            raise ValueError(
                f"Unknown global_pool {global_pool!r} for a MultiGrain model: choose 'gem', 'gem4', 'gem_learn', "
                "'avg', 'max', 'mac', 'spoc', 'rmac', 'crow', 'cls', 'cls+gem', 'trunk', 'map', or '' for the unpooled "
                "map.")
        if 'cls' in (prefix, name) and not fmt.class_token:
            raise ValueError(f'global_pool={global_pool!r} takes the class token, which this trunk does not have: '
                             "choose 'trunk', its own pooling, or 'gem'.")
        if isinstance(self.pool, GeM) and not self.pool.per_channel:
            args.update(p=self.pool.value())
        kwargs = dict(input_fmt=fmt.format, num_prefix_tokens=fmt.prefix_tokens)
        pool = nn.Identity() if own or not name else create_pool(name, **kwargs)
        if isinstance(pool, GeM):  # 'gem4', 'avg' and the like are GeM with that exponent
            if name != 'gem':
                args.update(p=pool.value(), learn_p=pool.learn_p, per_channel=False)
            channels = fmt.channels if args['per_channel'] else None
            pool = GeM(args['p'], args['learn_p'], num_channels=channels, eps=args['eps'], **kwargs)
            name = 'gem'
        self.feature_map, self.global_pool = fmt, f'cls+{name}' if prefix else name
        self.pool = pool.to(device=device).train(self.training)
        self.with_class_token = bool(prefix)
        self.pooled = bool(name)  # the whitening and the classifier work on pooled embeddings only
        channels = fmt.channels * (2 if prefix else 1)
        if channels != self.channels:
            self.channels = self.embed_dim = channels
            self.whitening = nn.Identity()

    def reset_fc(self, num_classes: int, device=None, dtype=None) -> None:
        """Give the head a fresh classifier of ``num_classes`` rows, none for 0."""
        if num_classes and not self.pooled:
            raise ValueError(f"global_pool='' gives the map itself, not an input for {num_classes} classes: "
                             'use num_classes=0 or a pooling.')
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)
        self.fc.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = self.pool(x)
        x = torch.cat([x[:, 0], pooled], 1) if self.with_class_token else pooled
        if self.pooled:
            x = self.whitening(x)
        return x if pre_logits else self.classify(x)

    def classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """(N, embed_dim) embedding to (N, num_classes) logits."""
        return self.fc(self.drop(embedding))


class MultiGrain(nn.Module):
    """A timm trunk, GeM pooling and a classifier, with all of timm's model verbs.

    ``forward_features`` gives the trunk's last map, ``forward_head(..., pre_logits=True)`` the embedding (whitened, if
    a whitening is fitted), ``forward`` the logits and ``embed`` the retrieval descriptor.

    Args:
        trunk: Name of a timm model that gives an NCHW, NHWC or NLC map, or with its own pooling of any.
        num_classes: Classes, 0 for a model whose output is the embedding.
        in_chans: Channels of the input image.
        global_pool: Pooling of the trunk's map: 'gem', 'gem4', 'gem_learn', 'avg' (p = 1), 'max' (p = inf), 'mac',
            'spoc', 'rmac', 'crow', or '' for none. Of tokens: 'cls', the class token, and 'cls+gem', beside it what
            GeM makes of the others. With the weights of the trunk's own head: 'trunk', which gives what timm's
            ``forward_head(..., pre_logits=True)`` does, and 'map', timm's attention pooling.
        gem_p: GeM exponent, > 0, inf allowed. None: 3, or the p of the pretrained weights.
        learn_p: Train the exponent.
        per_channel_p: One exponent a channel.
        gem_eps: Smallest value that enters the power.
        drop_rate: Dropout before the classifier.
        pretrained_trunk: Start from timm's weights for the trunk: True, or the name of a tag.
        whitening: Components of the whitened embedding (at most C + 1), None without whitening.
        trunk_pool: What 'trunk' pools with, by timm's name, where that is not what the trunk is made with.
        **trunk_kwargs: The trunk's own arguments (drop_path_rate, img_size, ...).

    Shape:
        (N, in_chans, H, W) float to (N, num_classes).

    Raises:
        ValueError: Unknown trunk, a trunk without what the pooling takes (a map of positions, a class token), or an
            impossible p, pooling or whitening.

    Example:
        >>> model = timm.create_model('multigrain_resnet18', num_classes=10).eval()
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> model.embed(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    __jit_unused_properties__ = [
        '_model_args', 'global_pool', 'gem_p', 'whitened', 'embed_dim', 'head_hidden_size', 'input_sizes']

    def __init__(
            self,
            trunk: str = 'resnet50',
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'gem',
            gem_p: float | None = None,
            learn_p: bool = False,
            per_channel_p: bool = False,
            gem_eps: float = 1e-6,
            drop_rate: float = 0.,
            pretrained_trunk: bool | str = False,
            whitening: int | None = None,
            trunk_pool: str | None = None,
            device=None,
            dtype=None,
            **trunk_kwargs,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        own_pool = {'trunk': trunk_pool, 'map': 'map'}.get(global_pool, '')
        self.trunk = create_trunk(trunk, pretrained_trunk, in_chans, own_pool, **trunk_kwargs, **dd)
        self._trunk_kwargs = {**trunk_kwargs, 'trunk_pool': trunk_pool}
        if ':' in trunk:  # what rebuilds the model is recorded, not the place that it came from
            trunk = self.trunk.pretrained_cfg['architecture']
            self._trunk_kwargs = rebuilding_args(self.trunk)
        self.trunk_name = trunk
        feature_map = probe_trunk(self.trunk, trunk, pooled=own_pool != '')
        self._describe(feature_map)
        infos = getattr(self.trunk, 'feature_info', [])
        self.feature_info = [dict(info, **({'module': f'trunk.{info["module"]}'} if 'module' in info else {}))
                             for info in copy.deepcopy(getattr(infos, 'info', infos))]
        gem_args = dict(p=3. if gem_p is None else gem_p, learn_p=learn_p, per_channel=per_channel_p, eps=gem_eps)
        self.head = MultiGrainHead(feature_map, num_classes, global_pool, gem_args, drop_rate, whitening, **dd)
        if gem_p is not None and global_pool != 'gem' and self.gem_p != GeM(gem_p).value():
            raise ValueError(f'global_pool={global_pool!r} and gem_p={gem_p} disagree: give one of them.')
        # an exponent that was asked for wins over the one of pretrained weights
        self.fixed_p = not self.head.gem_args['learn_p'] and (gem_p is not None or global_pool != 'gem')
        self.pretrained_cfg = self.default_cfg = model_cfg(self.trunk.pretrained_cfg, architecture='multigrain')
        self._input_sizes = None  # looked for when it is asked for
        self._recorded_args = {}
        self._traits = {k: v for k, v in get_model_traits(self.trunk).items() if k in ('img_size', 'fixed_input_size')}

    def _describe(self, feature_map: FeatureMap) -> None:
        """timm's attributes of what ``forward_features`` gives."""
        pooled = feature_map.format == 'NC'
        self.output_fmt = getattr(self.trunk, 'output_fmt', 'NCHW') if pooled else feature_map.format
        self.num_prefix_tokens = feature_map.prefix_tokens
        self.num_features = self.trunk.num_features if pooled else feature_map.channels

    @property
    def global_pool(self) -> str:
        """Name of the pooling that ``create_model(global_pool=...)`` takes."""
        return self.head.global_pool

    @property
    def gem_p(self) -> float | list[float] | None:
        """Exponent of GeM now, a list with one a channel, None with another pooling."""
        return self.head.pool.value() if isinstance(self.head.pool, GeM) else None

    @property
    def whitened(self) -> bool:
        """Whether the embedding goes through a whitening."""
        return isinstance(self.head.whitening, Whitening)

    @property
    def embed_dim(self) -> int:
        """Size of the embedding: the trunk's channels, or the components of the whitening."""
        return self.head.embed_dim

    head_hidden_size = embed_dim  # timm's name

    @property
    def input_sizes(self) -> InputSizes:
        """Image sizes that `forward` can take: any (a step of 1), multiples of a step, or one alone."""
        if self._input_sizes is None:
            self._input_sizes = find_input_sizes(self.trunk)
        return self._input_sizes

    @property
    def _model_args(self) -> dict:
        # timm's factory writes what create_model was given and its exporter reads what rebuilds the model. Computing it
        # from the model as it is keeps p and whitening right after they were tuned, however the model was made.
        gem, p = self.head.gem_args, self.gem_p
        args = {**self._recorded_args, **self._trunk_kwargs, 'trunk': self.trunk_name, 'learn_p': gem['learn_p'],
                'per_channel_p': gem['per_channel'], 'gem_eps': gem['eps']}
        if not isinstance(p, list):
            args['gem_p'] = 'inf' if p == float('inf') else p  # strict JSON has no Infinity
        if self.whitened:
            args['whitening'] = self.embed_dim
        return {k: v for k, v in args.items() if v is not None}

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        # The trunk's start weights are history once the model's own are saved: rebuilding must not fetch them again.
        self._recorded_args = {k: v for k, v in args.items() if k != 'pretrained_trunk'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict | Callable:
        """The trunk's layer groups, for layer decay; the head is the last one."""
        if not hasattr(self.trunk, 'group_matcher'):
            return {'trunk': r'^trunk\.'}
        matcher = self.trunk.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(name[6:]) if name.startswith('trunk.') else float('inf')
        return {
            group: [(_prefix_pattern(p), order) for p, order in spec] if isinstance(spec, (list, tuple))
            else spec and _prefix_pattern(spec)
            for group, spec in matcher.items()
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters no weight decay may pull: the trunk's own list, and a learned exponent."""
        names = {f'trunk.{n}' for n in getattr(self.trunk, 'no_weight_decay', set)()}
        return names | {f'head.pool.{n}' for n, _ in self.head.pool.named_parameters()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the trunk's backward."""
        self.trunk.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def set_input_size(self, img_size=None, **kwargs) -> None:
        """Change the image size of a trunk that is built for one (ViT); other trunks take any size as they are."""
        if hasattr(self.trunk, 'set_input_size'):
            self.trunk.set_input_size(img_size=img_size, **kwargs)
            self._input_sizes = None
            self._traits = dict(self._traits, img_size=get_model_traits(self.trunk).get('img_size'))

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name in the model."""
        return 'head.fc' if name_only else self.head.fc

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As any module's; takes also what `checkpoint_filter_fn` understands, such as timm's weights of the trunk.

        timm loads `checkpoint_path` (train.py --initial-checkpoint, validate.py --checkpoint) without a filter.
        """
        state = unwrapped(state_dict)
        if not is_multigrain(state) and not all(k.startswith('head.') for k in state):
            state = checkpoint_filter_fn(state, self)
        return super().load_state_dict(state, strict=strict, assign=assign)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a fresh classifier, 0 classes for none, and another ``global_pool`` if given, '' for the map.

        None keeps the pooling, its exponent and a whitening, and brings GeM back where classes need it.
        """
        if global_pool is None and num_classes and not self.head.pooled:
            global_pool = 'gem'
        if global_pool is not None:
            self.set_pool(global_pool)
        self.head.reset_fc(num_classes, **get_device_dtype(self))
        self.num_classes = num_classes

    @torch.jit.ignore
    def set_pool(self, global_pool: str) -> None:
        """Change the pooling. A classifier stays if the embedding has as many channels as before.

        The head of the trunk itself, once replaced by another pooling, does not come back.
        """
        has_own, dd = self.head.feature_map.format == 'NC', get_device_dtype(self)
        if global_pool in _OWN_POOLS:
            if not has_own:
                raise ValueError(f'{global_pool!r} needs the own head of the trunk {self.trunk_name!r}, which this '
                                 'model was made without: make it with that pooling, or open the timm model.')
            if global_pool == 'map' and getattr(self.trunk, 'attn_pool', None) is None:
                raise ValueError(f"The trunk {self.trunk_name!r} was not trained with attention pooling ('map'): "
                                 "choose 'trunk', its own pooling, or 'gem'.")
            self.head.reset_pool(global_pool, **dd)
        elif not has_own:
            self.head.reset_pool(global_pool, **dd)
        else:
            trunk = _headless(self.trunk, self.trunk_name)
            feature_map = probe_trunk(trunk, self.trunk_name)
            self.head.reset_pool(global_pool, **dd, feature_map=feature_map)
            self.trunk, self._trunk_kwargs = trunk, {**rebuilding_args(trunk), 'trunk_pool': None}
            self._describe(feature_map)
        if self.num_classes and not (self.head.pooled and self.head.fc.in_features == self.embed_dim):
            self.reset_classifier(0)

    @torch.jit.ignore
    def set_gem_p(self, p: float) -> None:
        """Set the exponent of GeM, for instance p* of a test resolution (paper section 4)."""
        if not isinstance(self.head.pool, GeM):
            raise ValueError(f'global_pool={self.global_pool!r} has no exponent to set to {p}: '
                             "reset_classifier(num_classes, 'gem') first.")
        self.head.pool.set_p(p)

    @torch.jit.ignore
    def set_whitening(self, components: int) -> None:
        """Make room for a whitening of so many components and a classifier of that width, both to be loaded."""
        dd = get_device_dtype(self)
        self.head.whitening = Whitening(self.head.channels, components, **dd)
        self.head.embed_dim = components
        self.head.reset_fc(self.num_classes, **dd)

    @torch.jit.ignore
    def forward_intermediates(
            self, x: torch.Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False, **kwargs,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The trunk's intermediate maps, and the last one as ``forward_features`` gives it. Arguments as in timm."""
        return self.trunk.forward_intermediates(x, indices=indices, intermediates_only=intermediates_only, **kwargs)

    @torch.jit.ignore
    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the layers behind the last of these intermediate maps. Arguments and result as in timm."""
        indices = self.trunk.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        pooled = self.head.feature_map.format == 'NC' and not prune_head
        feature_map = probe_trunk(self.trunk, self.trunk_name, pooled)
        if prune_head or feature_map.channels != self.head.feature_map.channels:
            self.head.reset_pool('', **get_device_dtype(self), feature_map=feature_map)
            self._describe(feature_map)
            self.reset_classifier(0)
        return indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to the trunk's map: (N, C, h, w), (N, h, w, C) or (N, L, C), see ``output_fmt``."""
        return self.trunk.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map to (N, num_classes) logits, or with ``pre_logits`` to the (N, embed_dim) embedding."""
        return self.head(self.trunk.forward_head(x), pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, num_classes) logits."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def embed(self, x: torch.Tensor | Sequence[torch.Tensor], dim: int | None = None) -> torch.Tensor:
        """Retrieval descriptors. The caller chooses eval mode and gradients.

        Args:
            x: Images (N, in_chans, H, W), or a list of (in_chans, H, W) images of any sizes, run one by one. Sizes that
                the trunk cannot take are resized to the nearest one that it can, see `input_sizes`.
            dim: Keep the first ``dim`` components of the whitening and normalise again.

        Returns:
            (N, dim or embed_dim) float32, each row L2-normalised.

        Raises:
            ValueError: No images, an image of another shape or kind, or a ``dim`` that the embedding does not allow.
        """
        if dim is not None and not (self.whitened and 1 <= dim <= self.embed_dim):
            raise ValueError(
                f'dim={dim} needs a whitened embedding of at least that many components, ordered by strength; '
                f'this one has {self.embed_dim}, {"" if self.whitened else "not "}whitened.')
        if isinstance(x, Sequence):
            if not x:
                raise ValueError('embed() got an empty list: give at least one image.')
            return torch.cat([self.embed(i[None] if getattr(i, 'ndim', 4) == 3 else i, dim=dim) for i in x])
        is_tensor = isinstance(x, torch.Tensor)
        if not is_tensor or x.ndim != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(
                f'embed() takes images (N, {self.in_chans}, H, W) or a list of ({self.in_chans}, H, W) ones, floating '
                'point and normalised as timm.data.create_transform makes them, '
                f'got {f"{x.dtype} of shape {tuple(x.shape)}" if is_tensor else type(x).__name__}.')
        if not is_traced():
            size = self.input_sizes.nearest(*x.shape[-2:])
            if size != tuple(x.shape[-2:]):
                x = F.interpolate(x, size=size, mode='bilinear', antialias=True)
        embedding = self.forward_head(self.forward_features(x), pre_logits=True)
        return l2_normalize(embedding[:, :dim].float())


def rebuilding_args(model: nn.Module) -> dict[str, Any]:
    """Of a timm model what a MultiGrain on such a trunk is made with."""
    args = dict(getattr(model, '_model_args', {}))
    own = {'trunk_pool': args.pop('global_pool', None)}
    return own | {k: v for k, v in args.items() if k not in ('num_classes', 'in_chans', 'drop_rate')}


def _headless(trunk: nn.Module, name: str) -> nn.Module:
    """A trunk with the same weights that gives its map."""
    trunk = sharing_copy(trunk)
    try:
        trunk.reset_classifier(0, '')
    except (AssertionError, TypeError) as e:
        raise ValueError(f"Trunk {name!r} pools in a way of its own only ({e}): its pooling is 'trunk'.") from e
    return trunk


def _prefix_pattern(pattern: str) -> str:
    """A group pattern of the trunk, anchored at any of its alternatives, for names below 'trunk.'."""
    return r'^trunk\.(?:' + re.sub(r'(?:^|(?<=[|(]))\^', '', pattern) + ')'
