"""The engine's fleet: engine processes on one machine behind the router that the simulator has, too.

    this process                                 each engine process (`member`)
    fleet      what is served, and the records
    dispatch   clients, router, outages          pace      its feed, its time, its reports
    seats      one for each instance      <-->   engine    loop, scheduler, model: as alone
    processes  who is there (`registry`)         lease     entered in the registry

They speak JSON over loopback (`wire`), and nothing that came through a socket is run. Two ways to have time:

    wall       real time, one clock of the machine. Who computes while others do is slowed down by them, as in serving.
    virtual    in lockstep: a step is run when nothing earlier can happen any more, one engine at a time, and takes the
               time that it took. What the fleet does and in which order does not depend on how many cores there are.
"""
