"""``mics doctor``: what could spoil a job, looked for on all of its ranks before it starts."""
