//! A connection, plain or with TLS, that transfers large bodies with little processor time.
//!
//! Without TLS, a file is sent with `sendfile(2)`, and the kernel drops the body of an upload, so neither is copied
//! into this process. With TLS, both are copied, as in any server without kernel TLS.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use tokio_rustls::rustls::{ServerConnection, StreamOwned};

/// Send buffer of a connection with a rate limit, in bytes. The kernel doubles it.
const SEND_BUFFER_BYTES: u32 = 256 * 1024;
/// Bytes that are copied at a time with TLS.
const TLS_CHUNK: u64 = 256 * 1024;

pub(super) enum Wire {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Wire {
    /// Sends up to `size` bytes of a file from offset `at`. Returns how many were sent.
    pub(super) fn send_file(&mut self, file: &File, at: u64, size: u64) -> io::Result<u64> {
        match self {
            Self::Plain(stream) => {
                let mut offset = at;
                let sent = rustix::fs::sendfile(stream, file, Some(&mut offset), size as usize)?;
                if sent == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(sent as u64) }
            }
            Self::Tls(stream) => {
                let mut chunk = vec![0; size.min(TLS_CHUNK) as usize];
                file.read_exact_at(&mut chunk, at)?;
                stream.write_all(&chunk)?;
                Ok(chunk.len() as u64)
            }
        }
    }
}

/// Limits the rate of a connection to `bytes_per_s`. The kernel spaces the packets evenly, as on a network whose
/// connections have this rate.
#[expect(unsafe_code, reason = "setsockopt(2) has no safe wrapper for SO_MAX_PACING_RATE")]
pub(super) fn pace(stream: &TcpStream, bytes_per_s: u64) -> io::Result<()> {
    let set = |option: libc::c_int, value: u32| {
        let length = size_of::<u32>() as libc::socklen_t;
        // SAFETY: the pointer is valid for `length` bytes during the call.
        match unsafe {
            libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), length)
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(libc::SO_MAX_PACING_RATE, u32::try_from(bytes_per_s).unwrap_or(u32::MAX))?;
    // With a large buffer, a response would count as sent long before its bytes have left.
    set(libc::SO_SNDBUF, SEND_BUFFER_BYTES)
}

/// Reads `size` bytes and discards them.
pub(super) fn discard(wire: &mut BufReader<Wire>, size: u64) -> io::Result<()> {
    // The start of the body may be buffered already.
    let buffered = (wire.buffer().len() as u64).min(size);
    wire.consume(buffered as usize);
    let mut left = size - buffered;
    let mut buffer = Vec::new();
    while left > 0 {
        let taken = match wire.get_mut() {
            Wire::Plain(stream) => drop_received(stream, left.min(4 << 20) as usize)?,
            tls @ Wire::Tls(_) => {
                buffer.resize(TLS_CHUNK as usize, 0);
                let most = left.min(TLS_CHUNK) as usize;
                tls.read(&mut buffer[..most])?
            }
        };
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= taken as u64;
    }
    Ok(())
}

/// Drops up to `most` received bytes without copying them (`MSG_TRUNC`, see tcp(7)).
#[expect(unsafe_code, reason = "the safe wrapper requires a buffer, which this call avoids")]
fn drop_received(stream: &TcpStream, most: usize) -> io::Result<usize> {
    loop {
        // SAFETY: with MSG_TRUNC a TCP socket writes nothing to the buffer, which may therefore be null.
        let taken = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), most, libc::MSG_TRUNC) };
        match usize::try_from(taken) {
            Ok(taken) => return Ok(taken),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}
