"""Topology evolution inside other people's trainers, one small file each.

- :mod:`chts_train.adapters.huggingface`: a callback for the ``Trainer`` of transformers;
- :mod:`chts_train.adapters.lightning`: a callback for Lightning's ``Trainer``;
- :mod:`chts_train.adapters.torchtitan`: a model converter for torchtitan.

Nothing is imported here: each file needs its own trainer, and only that. Call :func:`chts_train.sparsify_` on the model before the
trainer sees it; pattern ids are buffers, so the trainer's own checkpoints carry them. All three let the optimizer's hooks
drive the evolution (:meth:`chts_train.TopologyEvolver.attach`): what counts is a step of the optimizer, whatever number of
batches made its gradient, and the trainer's learning-rate schedule moves at topology updates too.
"""
