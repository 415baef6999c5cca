"""The two hops of gradient synchronisation."""
