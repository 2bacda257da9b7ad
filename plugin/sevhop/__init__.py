"""
sevhop replaces the QEMU process under a running guest, without rebooting it.

Programs use :mod:`sevhop.api`, and nothing else of these packages. Folders are rooms with their modules; a room
imports only from those below it.

===========================  =========================================================================================
:mod:`sevhop.cli`            the ``sevhop`` command: main, parser, commands (which has a module for each), output,
                             outcomes, progress (on a terminal), terminal (signals), interruptible, exit_codes
:mod:`sevhop.observe`        records for monitoring: journald (systemd's journal), metrics (Prometheus)
:mod:`sevhop.api`            the public interface for Python
:mod:`sevhop.engine`         what changes a guest. Outside libvirt: hop, with its phases in check, prepare, transfer,
                             commit, finish; start, destination, guest_paths, source_watch, state_transfer, realtime,
                             realtime_reset. A libvirt domain: upgrade, with its phases in upgrade_prepare,
                             upgrade_save, upgrade_restore; rehearsal, rehearsal_command_line, isolated_tap,
                             present_cards, retire, fleet. The hop of its guest into a QEMU beside libvirt: transit_hop,
                             transit, transit_blockers, fixed_taps, transit_command_line, transit_descriptors.
                             Both: transaction (rollback and commit), stopped_guest (verified, resumed). After an
                             interruption: recovery, hop_recovery, domain_recovery, interrupted_qemu, ownership (which
                             QEMU may run the guest), recovery_result
:mod:`sevhop.checks`         can a guest hop: guest, domain (what depends on libvirt), confinement, sev_host, result;
                             status and domain_status
:mod:`sevhop.install`        ``sevhop install``: host, apparmor, units, atomic_file, verification
:mod:`sevhop.keeper`         has memory, VM and sockets between two QEMUs: handover (the protocol with adopt.so), local
                             (inside a command). As a process: main, supervisor (restarts the keeper), fdstore (its
                             checkpoints), server (what it does), state (what it may do), record, source,
                             destination, restore, context_vms, saved_blocks, clients, tasks; config and paths (known to
                             both sides), client (the command's side)
:mod:`sevhop.records`        what an interrupted hop leaves behind: hop_record, journal, run_directory
:mod:`sevhop.libvirt`        its interfaces: daemon, connection, domain, domain_monitor, source_monitor,
                             qemu_events, domain_xml, save_image, lock_manager, hook, hook_server
:mod:`sevhop.disks`          block_graph (the disks that a guest has now), comparison, images (their files), devices,
                             present_disks (as options), disk_guard (changes meanwhile)
:mod:`sevhop.guest`          what runs a guest: inspection, command_line, emulator, preload (adopt.so), cpu_features,
                             runtime_settings, saved_settings, plugged_vcpus, vm_generation_id, block_queries, absent,
                             pid_file
:mod:`sevhop.process`        Linux processes: launch, launcher, dialogue (with a program that is probed), confinement,
                             seccomp_filter, scheduling, cgroup_memory, machine_cgroup, apparmor_profile, in_words
:mod:`sevhop.cancellation`   work that is completed despite a cancellation
:mod:`sevhop.events`         events that report hops in progress
:mod:`sevhop.report`         the report of a hop
:mod:`sevhop.errors`         how a hop fails, and the guest's state then
:mod:`sevhop.options`        options and their defaults
===========================  =========================================================================================
"""
