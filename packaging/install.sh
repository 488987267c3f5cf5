#!/bin/sh
# Installs modelcache @VERSION@: downloads the archive of this machine's architecture, verifies its SHA-256 digest, and
# unpacks it below the prefix. Nothing is installed if the digest differs.
#
#   sh install.sh [--prefix FOLDER] [--from FOLDER-OR-URL]
#
# --prefix   where bin/, share/man/ and the shell completions are put (default: ~/.local; /usr/local needs root)
# --from     the folder or the URL that has the archive (default: the release page, once there is one)
#
# The digests are part of this file, so whoever trusts this file gets exactly these archives.
set -eu

version=@VERSION@
digests='@DIGESTS@'
from=@URL@
prefix=${HOME:+$HOME/.local}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --from)
            [ $# -gt 1 ] || fail "$1 needs a value"
            if [ "$1" = --prefix ]; then prefix=$2; else from=$2; fi
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done

[ -n "$prefix" ] || fail "HOME is not set; choose a folder with --prefix"
[ "$(uname -s)" = Linux ] || fail "modelcache runs on Linux, and this is $(uname -s)"
architecture=$(uname -m)
case $architecture in
    amd64) architecture=x86_64 ;;
    arm64) architecture=aarch64 ;;
esac
archive=modelcache-$version-$architecture-linux.tar.gz
digest=$(echo "$digests" | sed -n "s/^\([0-9a-f]\{64\}\)  $archive\$/\1/p")
[ -n "$digest" ] || fail "there is no archive for $architecture; build from source: cargo install --path crates/modelcache-cli"
[ -n "$from" ] || fail "name the folder or the URL of $archive: --from FOLDER-OR-URL"
command -v sha256sum >/dev/null || fail "sha256sum is missing; install coreutils"

# Below the prefix, so that the program gets its name by a rename on one filesystem.
mkdir -p "$prefix/bin" || fail "cannot create $prefix/bin; choose another folder with --prefix, or become root"
work=$(mktemp -d "$prefix/.modelcache-install.XXXXXX") || fail "cannot write into $prefix; choose another --prefix"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

case $from in
    http://* | https://*)
        if command -v curl >/dev/null; then
            curl --fail --silent --show-error --location --retry 3 --output "$work/$archive" "$from/$archive" ||
                fail "cannot download $from/$archive"
        elif command -v wget >/dev/null; then
            wget -q -O "$work/$archive" "$from/$archive" || fail "cannot download $from/$archive"
        else
            fail "curl and wget are missing; install one of them"
        fi
        ;;
    *) cp "$from/$archive" "$work/$archive" || fail "cannot read $from/$archive" ;;
esac

actual=$(sha256sum "$work/$archive" | cut -d ' ' -f 1)
[ "$actual" = "$digest" ] ||
    fail "$archive has the SHA-256 digest $actual instead of $digest: damaged or replaced; nothing was installed"

tar -xzf "$work/$archive" -C "$work" || fail "cannot unpack $archive; is the disk full?"
unpacked=$work/modelcache-$version-$architecture-linux
"$unpacked/modelcache" --version >/dev/null || 
    fail "the program does not run, see above; if $prefix is mounted noexec, choose another --prefix"

# SOURCE FOLDER NAME [MODE]
put() {
    mkdir -p "$prefix/$2" && cp "$1" "$work/new" && chmod "${4:-644}" "$work/new" && mv -f "$work/new" "$prefix/$2/$3" ||
        fail "cannot write $prefix/$2/$3"
}
for page in "$unpacked"/man/*; do
    put "$page" share/man/man1 "${page##*/}"
done
put "$unpacked/completions/modelcache.bash" share/bash-completion/completions modelcache
put "$unpacked/completions/_modelcache" share/zsh/site-functions _modelcache
put "$unpacked/completions/modelcache.fish" share/fish/vendor_completions.d modelcache.fish
# Last, so that a program that is found is wholly installed.
put "$unpacked/modelcache" bin modelcache 755

echo "installed modelcache $version as $prefix/bin/modelcache"
case :${PATH:-}: in
    *":$prefix/bin:"*) ;;
    *) echo "add it to the PATH: export PATH=$prefix/bin:\$PATH" ;;
esac
