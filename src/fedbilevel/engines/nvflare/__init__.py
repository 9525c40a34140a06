"""The network engine, on NVIDIA FLARE: the same algorithm between long-lived processes that own their data.

    server.py      runs the server program inside nvflare's server process
    transport.py   carries requests to the sites by nvflare's collab calls
    calls.py       what the server may ask of the sites, and the kinds of what comes back
    messages.py    what all of them tell each other, one struct for each message, checked where it is read
    site.py        what the server may call at a site, and nothing else; keeps the site's worker alive
    worker.py      the process that holds a site's rows, compiled code and state
    agreement.py   what server and sites derive alike, without any rows
    ledger.py      rounds.csv
    job.py         job folders
    launch.py      a run on this machine, in a process of its own: in nvflare's simulator or provisioned
    poc.py         a provisioned deployment on this machine
    processes.py   the processes of a run, by the mark that they carry

Numbers travel as bytes, in the order of the protocol, which both sides derive for themselves; their structure never does,
and nothing is pickled.
"""
