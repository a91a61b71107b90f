"""Services: the singletons of an application, declared once, swapped while they work.

`declaration` is what the application says, `instance` one built object with its leases, `verbs` how it is told
something, `registry` all of them in this process, `swap` how one is replaced by another, `options` where its
settings come from (`schema`: of which types, `secret`: what nobody sees), `report` what is told of them.
"""
