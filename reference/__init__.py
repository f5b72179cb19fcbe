"""The ideas of the course as short, tested modules: torch, and nothing of the course itself.

A module may import those of its own unit and of earlier ones. A folder's first file is the idea.

    any  arguments, capability
    00   memory (budget, breakdown, recipes, activations, sharding)
    00   model_shapes
    01   lowrank (svd, subspace)
    02   lora (layer, base, weights, conv_embedding, called, targets, replace, inject, mixed)
    02   lora (generation, trained, parameters), adapter_format (files, whole, keys, config)
    03   blockwise
    04   nf4
    05   double_quant
    06   qlora (quantize, dense, layer, merge, product, ops, format), llama (model, loss, step)
    07   paging (optimizer, update, layout, pool, lanes, state, offloaded, buckets)
    07   offload (sequential, stores)
    08   checkpointing (checkpoint, call, surroundings, captured, hooks, sequential, schedule)
    08   checkpointing (offload, lane, pool), precision (masters, scaler, rounding)
    09   ewc (penalty, fisher, squares, layers, adapters)
    09   rehearsal (buffer, gradients, logits, weights), progressive
    10   wrapped, lora (dora), ia3, t_few, soft_prompts (prompt, encoder, prefix)
    10   bottleneck, fusion, relatives (updates, inject, starts, subsets)
    10   adapter_format (variants, layers, prompts, family)
    11   multi_lora (layer, route, on_gpu, factors, model, combine, rules, serving, simulation)
    12   instruct (conversation, masks, rows, packing), self_instruct (tasks, novelty, loop)
    13   kernels (launch, first, low_rank, nf4, adamw, dora, multi_lora)
    14   sharded (shard, engine, layer, group, files)

Kernels compute what modules of earlier units define; those reach for them where a GPU is, at the
call and not before.
"""
