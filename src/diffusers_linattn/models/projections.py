"""Names of the projections inside the attention modules of diffusers."""

# What `reset_projections` starts afresh, and what distillation trains besides a processor's own weights: the query,
# key, value and output projections of the image (in single-stream layers of all tokens).
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0", "to_out"),
    *("to_query", "to_key", "to_value", "out_layer"),
    *("img_attn_qkv", "img_attn_proj", "img_qkv_proj", "to_qkv_mlp_proj"),
)

# What makes the queries, perhaps keys and values as well: its width is that of the layer's input.
QUERY_PROJECTIONS = ("to_q", "to_query", "to_qkv", "to_qkv_mlp_proj", "img_attn_qkv", "img_qkv_proj")
