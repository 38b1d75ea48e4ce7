"""One rank of a running job: processes, collectives on torch.distributed, parameters, steps."""
