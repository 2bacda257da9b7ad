"""
sevhop replaces the QEMU process under a running guest.

Programs use :mod:`sevhop.api`, and nothing else of these packages.

============================  =============================================================================
:mod:`sevhop.api`             what can be done, from Python; what is promised to stay
:mod:`sevhop.events`          what is told of hops while they are under way
:mod:`sevhop.report`          what has become of a hop
:mod:`sevhop.observe.journald`        records of hops, for the journal of systemd
:mod:`sevhop.observe.metrics`         numbers of them, for Prometheus
:mod:`sevhop.cli.progress`         what is seen of them on a terminal
:mod:`sevhop.cli.commands`             the command line: arguments, output, exit codes
:mod:`sevhop.checks.guest`           can this guest hop? what holds wherever it runs
:mod:`sevhop.checks.result`         what a check finds: a tree of named tests
:mod:`sevhop.guest.emulator`        a QEMU binary: its version and machine types, and whether it can be trusted
:mod:`sevhop.guest.preload`         whether adopt.so gets into it, as the guest's user
:mod:`sevhop.checks.sev_host`        what the host must have for an SEV context to be moved
:mod:`sevhop.guest.inspection`           what a running QEMU tells of its guest
:mod:`sevhop.keeper.handover`          what holds the guest's memory, VM and sockets between two QEMUs
:mod:`sevhop.engine.transaction`       what both engines have in common: phases, journal, undoing
:mod:`sevhop.records.journal`         what a hop is about to do, for whoever has to finish or undo it
:mod:`sevhop.engine.recovery`         hops that were broken off, brought to one of two ends
:mod:`sevhop.records.run_directory`   where hops under way are found
:mod:`sevhop.errors`          how a hop can end other than well
============================  =============================================================================

A guest outside libvirt, with both QEMUs alive during the hop:

============================  =============================================================================
:mod:`sevhop.engine.hop`             the engine: the phases of a hop in order, each with its undo
:mod:`sevhop.guest.command_line`    the destination's command line, derived from the source's
:mod:`sevhop.engine.destination`     the new QEMU process: started like the old one, and ended again
:mod:`sevhop.process.launch`          starts a process that is, to the kernel, what another one is
:mod:`sevhop.process.confinement`     what confines a QEMU, by what the kernel says
:mod:`sevhop.process.seccomp_filter`  what the sandboxes of two QEMUs forbid, compared
:mod:`sevhop.process.scheduling`      how the threads of a QEMU are scheduled
:mod:`sevhop.process.cgroup_memory`     whether its cgroup has memory for a second QEMU
:mod:`sevhop.guest.pid_file`        where its pid file is
:mod:`sevhop.engine.guest_paths`     the paths under which a guest is known, handed over to it
:mod:`sevhop.engine.realtime`         who takes part goes before others while the guest stands still
:mod:`sevhop.engine.realtime_reset`   the priority that is lent for that, and who takes it back
============================  =============================================================================

A domain of libvirt, where one QEMU ends before the next one starts:

============================  =============================================================================
:mod:`sevhop.engine.upgrade`         the engine, likewise
:mod:`sevhop.engine.fleet`           upgrades of several domains, a few at a time
:mod:`sevhop.checks.domain`    can this domain hop? what depends on libvirt
:mod:`sevhop.checks.domain_status`        where a domain stands: versions, obstacles, hops under way
:mod:`sevhop.checks.status`          where all of them do, found out
:mod:`sevhop.keeper.server`         the keeper as a process of its own, which also commits
:mod:`sevhop.keeper.client`  that process, started and spoken to
:mod:`sevhop.keeper.supervisor`        what the keeper holds, a second time
:mod:`sevhop.engine.domain_recovery`  a domain's hop that was broken off, brought to its end
:mod:`sevhop.libvirt.hook`            what libvirt calls before the guest may run
:mod:`sevhop.install.host`    that hook, put in place and seen to be called
:mod:`sevhop.libvirt.connection`          the few libvirt calls that are made
:mod:`sevhop.libvirt.domain_xml`      the domain's XML: what a destination needs, put in and taken out
:mod:`sevhop.libvirt.save_image`      libvirt's save image, written and read
============================  =============================================================================
"""
