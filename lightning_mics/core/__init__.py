"""The engine: groups, units, FSDP2, collectives, gradients."""
