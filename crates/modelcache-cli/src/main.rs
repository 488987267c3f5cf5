//! The `modelcache` binary. All other code is in the library of this crate.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
    look_up_names_without_plugins();
    ExitCode::from(modelcache_cli::run(std::env::args_os()))
}

/// Makes a statically linked program look up hosts in /etc/hosts and by DNS, and users in /etc/passwd, whatever
/// /etc/nsswitch.conf says. Otherwise glibc loads the plug-ins named there from the machine. The program can crash if they
/// belong to another version of glibc.
#[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
#[expect(unsafe_code, reason = "a function of glibc without a safe wrapper")]
fn look_up_names_without_plugins() {
    use std::ffi::{CStr, c_char, c_int};

    unsafe extern "C" {
        // From nss.h of glibc. It copies both texts.
        fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> c_int;
    }
    let services: [(&CStr, &CStr); 2] = [(c"hosts", c"files dns"), (c"passwd", c"files")];
    for (database, services) in services {
        // SAFETY: both texts end with a zero byte, and no other thread runs yet.
        let result = unsafe { __nss_configure_lookup(database.as_ptr(), services.as_ptr()) };
        // It fails only if the memory is used up.
        assert_eq!(result, 0, "cannot configure the lookup of {database:?}");
    }
}
