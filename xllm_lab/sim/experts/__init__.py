"""Experts under load: what each expert has to compute as time goes by, what that costs where experts lie, and what a
policy that moves them makes of it.

    loads        tokens of each expert in each layer and tick: recorded, or drawn from a process
    shares       tokens of each slot and each device under a placement; time of steps by the most loaded device
    routing      what the most loaded device has to do in a step of so many tokens, for the cost models
    balancing    a policy that is asked at the end of each interval, and what its changes cost
"""
