"""What a node of either role is made of: joins the engine and the KV transfer, which do not know
each other. `wiring` is the parts, `requests` what both roles do with a gateway's request,
`reserving` how they wait for blocks, `spare_blocks` where those come
from that only measure."""
