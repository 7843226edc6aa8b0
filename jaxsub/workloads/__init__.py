"""Plug-ins: what `jaxsub bench` times. One kernel each, with its work, its oracle and its peers."""
