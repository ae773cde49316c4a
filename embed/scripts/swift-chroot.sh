#!/bin/sh
# A root directory with Debian trixie and its Swift toolchain, for machines without Swift: as root,
#     embed/scripts/swift-chroot.sh DIRECTORY [MIRROR]
# Needs debootstrap, some 4 GB, and a few minutes; what is there already is kept.
set -eu
root=$1
mirror=${2:-http://deb.debian.org/debian}
if [ ! -x "$root/usr/bin/apt-get" ]; then
  # The suite may be newer than debootstrap: all of them are made as sid is.
  scripts=/usr/share/debootstrap/scripts
  [ -e "$scripts/trixie" ] && script= || script=$scripts/sid
  debootstrap --variant=minbase trixie "$root" "$mirror" $script
fi
if [ ! -x "$root/usr/bin/swift" ]; then
  chroot "$root" apt-get update -q
  chroot "$root" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends swiftlang g++ libopenblas0-pthread
  chroot "$root" apt-get clean
fi
for point in proc dev; do
  mountpoint -q "$root/$point" || mount --bind "/$point" "$root/$point" || true
done
chroot "$root" swift --version
