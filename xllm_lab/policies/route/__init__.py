"""Which instance of a fleet takes a request. One file a policy; the interface is `policies.routing`."""
