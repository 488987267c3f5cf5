#!/bin/sh
# Installs modelcache @VERSION@; `sh install.sh --help` explains it. The digests are part of this file, so whoever trusts
# this file gets exactly these archives.
set -eu

version=@VERSION@
digests='@DIGESTS@'
from=@URL@
prefix=${HOME:+$HOME/.local}

usage() {
    cat <<END
Usage: sh install.sh [--prefix FOLDER] [--from FOLDER-OR-URL]

Installs modelcache $version: gets the archive for this machine, verifies its SHA-256 digest, and puts the program, its
manual pages and the completions of the shells below the prefix. Nothing is installed if the digest differs.

--prefix   default: ~/.local; /usr/local needs root
--from     the folder or the URL that has the archive (default: the release page, once there is one)
END
}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

# A function, so that a script that arrives incomplete through a pipe does nothing.
main() {
    while [ $# -gt 0 ]; do
        case $1 in
            --prefix | --from)
                [ $# -gt 1 ] || fail "$1 needs a value"
                if [ "$1" = --prefix ]; then prefix=$2; else from=$2; fi
                shift 2
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) fail "unknown argument $1; see --help" ;;
        esac
    done
    [ -n "$prefix" ] || fail "HOME is not set; choose a folder with --prefix"
    [ -n "$from" ] || fail "name the folder or the URL of the archive: --from FOLDER-OR-URL"
    # Absolute, so that no name looks like an option or like a remote host.
    prefix=$(absolute "$prefix")
    case $from in
        http://* | https://*) ;;
        *) from=$(absolute "$from") ;;
    esac

    [ "$(uname -s)" = Linux ] || fail "modelcache runs on Linux, and this is $(uname -s)"
    architecture=$(uname -m)
    case $architecture in
        amd64) architecture=x86_64 ;;
        arm64) architecture=aarch64 ;;
    esac
    name=modelcache-$version-$architecture-linux
    digest=$(echo "$digests" | sed -n "s/^\([0-9a-f]\{64\}\)  $name\.tar\.gz\$/\1/p")
    [ -n "$digest" ] ||
        fail "there is no archive for $architecture; in a checkout: cargo install --path crates/modelcache-cli"
    for program in sha256sum tar gzip; do
        command -v $program >/dev/null || fail "$program is missing; install it"
    done

    # Other users may use what is installed.
    umask 022
    # Below the prefix, so that each file gets its name by a rename on one filesystem.
    mkdir -p "$prefix/bin" || fail "cannot create $prefix/bin; choose another folder with --prefix, or become root"
    work=$(mktemp -d "$prefix/.modelcache-install.XXXXXX") || fail "cannot write into $prefix; choose another --prefix"
    trap 'rm -rf "$work"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM

    fetch "$name.tar.gz"
    actual=$(sha256sum <"$work/$name.tar.gz" | cut -d ' ' -f 1)
    [ "$actual" = "$digest" ] || fail "$name.tar.gz has the SHA-256 digest $actual instead of $digest: it is damaged or
    replaced, and nothing was installed"
    tar -xzf "$work/$name.tar.gz" -C "$work" || fail "cannot unpack $name.tar.gz; is the disk full?"
    "$work/$name/modelcache" --version >/dev/null ||
        fail "the program does not run, see above; if $prefix is mounted noexec, choose another --prefix"

    for page in "$work/$name"/man/*; do
        put "$page" share/man/man1 "${page##*/}"
    done
    put "$work/$name/completions/modelcache.bash" share/bash-completion/completions modelcache
    put "$work/$name/completions/_modelcache" share/zsh/site-functions _modelcache
    put "$work/$name/completions/modelcache.fish" share/fish/vendor_completions.d modelcache.fish
    # Last, so that a program that is found is wholly installed.
    put "$work/$name/modelcache" bin modelcache

    echo "installed modelcache $version as $prefix/bin/modelcache"
    case :${PATH:-}: in
        *":$prefix/bin:"*) ;;
        *) echo "add it to the PATH: export PATH=\"$prefix/bin:\$PATH\"" ;;
    esac
}

# Prints the absolute form of a path.
absolute() {
    case $1 in
        /*) echo "$1" ;;
        *) echo "$PWD/$1" ;;
    esac
}

# Gets the file NAME into the working folder.
fetch() {
    case $from in
        http://* | https://*) ;;
        *)
            cp "$from/$1" "$work/$1" || fail "cannot read $from/$1"
            return
            ;;
    esac
    # A server that sends nothing for a minute is given up.
    if command -v curl >/dev/null; then
        curl --fail --silent --show-error --location --retry 3 --connect-timeout 20 --speed-limit 1000 \
            --speed-time 60 --output "$work/$1" "$from/$1" || fail "cannot download $from/$1"
    elif command -v wget >/dev/null; then
        wget -q -T 60 -O "$work/$1" "$from/$1" || fail "cannot download $from/$1"
    else
        fail "curl and wget are missing; install one of them"
    fi
}

# Moves the file SOURCE to NAME in FOLDER below the prefix.
put() {
    [ ! -d "$prefix/$2/$3" ] || fail "$prefix/$2/$3 is a folder; remove it"
    mkdir -p "$prefix/$2" && mv -f "$1" "$prefix/$2/$3" || fail "cannot write $prefix/$2/$3"
}

main "$@"
