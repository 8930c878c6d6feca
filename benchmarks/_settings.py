"""What all candidates have in common, and what Pyro's are called."""

DECAY = 0.9
LEARNING_RATE = 1e-3
PYRO_AVERAGE = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": DECAY}}
TRACE = "Pyro Trace_ELBO"
GRAPH = "Pyro TraceGraph_ELBO + average"
