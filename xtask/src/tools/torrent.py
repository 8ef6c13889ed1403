"""libtorrent as a peer.

  torrent.py make PATH TORRENT TRACKER      TRACKER may be empty
  torrent.py seed TORRENT FOLDER IP PORT
  torrent.py fetch TORRENT FOLDER IP PORT SEED DONE

SEED is an address to connect to, or empty where a tracker tells. Without DONE a fetcher ends when it
has everything; else it makes that file and goes on serving. TCP alone: uTP is many times slower here.
"""
import os
import sys
import time

import libtorrent as lt


def make(path, torrent, tracker):
    files = lt.file_storage()
    lt.add_files(files, path)
    # As is usual: 1 MiB from 1 GiB on, else 256 KiB. The first version of the format: the second pads
    # every file to a whole piece.
    size = (1 << 20) if files.total_size() >= (1 << 30) else (256 << 10)
    made = lt.create_torrent(files, size, flags=lt.create_torrent.v1_only)
    if tracker:
        made.add_tracker(tracker)
    lt.set_piece_hashes(made, os.path.dirname(path))
    with open(torrent, "wb") as out:
        out.write(lt.bencode(made.generate()))


def peer(role, torrent, folder, ip, port, seed="", done=""):
    session = lt.session({
        "listen_interfaces": f"{ip}:{port}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        "allow_multiple_connections_per_ip": True,
        "alert_mask": lt.alert.category_t.status_notification,
    })
    add = lt.add_torrent_params()
    add.ti = lt.torrent_info(torrent)
    add.save_path = folder
    add.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if role == "seed":
        add.flags |= lt.torrent_flags.seed_mode
    handle = session.add_torrent(add)
    dialled = 0
    while True:
        if role == "fetch":
            if handle.status().is_seeding:
                if not done:
                    return
                open(done, "w").close()
                role = "seed"
            elif seed and time.monotonic() - dialled > 1 and handle.status().num_peers == 0:
                dialled = time.monotonic()
                at, of = seed.rsplit(":", 1)
                handle.connect_peer((at, int(of)))
        session.wait_for_alert(1000 if role == "seed" else 20)
        session.pop_alerts()


make(*sys.argv[2:]) if sys.argv[1] == "make" else peer(*sys.argv[1:])
