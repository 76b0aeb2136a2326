"""A Llama of two layers whose weights are set by hand so that it repeats what it has read: an induction circuit.

Layer 0 attends to the token before (constant query and key, turned against each other by one position) and writes that
token's code beside the current one's. Layer 1 looks for tokens that followed the current one (query: the current code,
key: the code before) and writes their code where the output matrix reads it.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODE = 48  # numbers of a token's code; the hidden state holds three: current, before, next
HEAD = 64
HIGH = 8  # RoPE pairs that turn fast enough to tell positions apart; the others hold codes
THETA = 1e12


def copying_llama(vocabulary=512, context=512, heads=1):
    """`heads` above 1: the others are idle."""
    config = LlamaConfig(
        hidden_size=3 * CODE, intermediate_size=8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD, vocab_size=vocabulary, max_position_embeddings=context, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    codes = torch.randn(vocabulary, CODE, generator=torch.Generator().manual_seed(0))
    codes = codes / codes.norm(dim=1, keepdim=True)
    current, before, following = (slice(i * CODE, (i + 1) * CODE) for i in range(3))
    slow = torch.cat([torch.arange(HIGH, HEAD // 2), torch.arange(HEAD // 2 + HIGH, HEAD)])  # CODE channels
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, current] = codes
        model.lm_head.weight[:, following] = 6 * codes
        first, second = (layer.self_attn for layer in model.model.layers)
        turn = THETA ** (-2 * torch.arange(HIGH) / HEAD)
        first.q_proj.bias[:HIGH] = 20.0
        # The key one position back, once RoPE has turned both: the query's direction.
        first.k_proj.bias[:HIGH] = 20.0 * turn.cos()
        first.k_proj.bias[HEAD // 2 : HEAD // 2 + HIGH] = 20.0 * turn.sin()
        eye = torch.eye(CODE)
        for layer, target in ((first, before), (second, following)):
            layer.v_proj.weight[:CODE, current] = eye
            layer.o_proj.weight[target, :CODE] = eye / (3 * CODE) ** 0.5
        second.q_proj.weight[slow, current] = 4 * eye
        second.k_proj.weight[slow, before] = 4 * eye
    return model
