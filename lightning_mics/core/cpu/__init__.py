"""What exists only because CPUs have no streams: rings, gathering ahead, reductions that run on."""
