"""One layer in plain PyG code: states attend to the tokens that edges come from."""

import torch

from nsm_graph import Relation
from nsm_graph.nn import HybridAttention, TokenToStateRouter

torch.manual_seed(0)
tokens, states = torch.randn(7, 8), torch.randn(4, 16)  # two examples: 5 + 2 tokens, 2 + 2 states

# Any PyG edge_index will do: tokens above, states below.
edge_index = torch.tensor([[0, 1, 2, 3, 4, 0, 5, 6], [0, 0, 0, 1, 1, 1, 2, 3]])
attention = HybridAttention((8, 16), heads=4)
attended, (_, alpha) = attention((tokens, states), edge_index, return_attention_weights=True)
print("attended", tuple(attended.shape), "one weight per edge and head", tuple(alpha.shape))

# A relation that knows it is complete per example stores no edges and is computed densely.
relation = Relation.complete(src_ptr=[0, 5, 7], dst_ptr=[0, 2, 4])
dense = attention((tokens, states), relation)
by_edges = attention((tokens, states), relation.edge_index)
print("complete relation = its edges:", torch.allclose(dense, by_edges, atol=1e-6))

# The router decides which states a token writes to; its weights leave each token with sum 1.
router = TokenToStateRouter(8, 16, num_states=2, top_k=1)
routed, (edges, weights) = router(tokens, relation, return_attention_weights=True)
print("top_k=1 keeps one edge per token:", edges.shape[1] == len(tokens), weights.tolist()[:2])
