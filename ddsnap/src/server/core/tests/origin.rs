// SPDX-License-Identifier: GPL-2.0-only
//! Who may write to the origin behind a server's end.

use super::*;

/// A fingerprint taken while a device of the origin was left would have called the next start's origin a foreign
/// one: a package upgrade restarts the server under a mounted volume.
#[test]
fn an_origin_with_a_device_is_in_use_when_the_server_ends() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    assert_eq!(core.origin_use(), OriginUse::Unused);
    send(&mut core, &[identify(1, 7, None, ORIGIN_SECTORS)]);
    assert_eq!(core.origin_use(), OriginUse::InUse);
    send(&mut core, &[ask(2, Ask::Gone { device: 7 })]);
    assert_eq!(core.origin_use(), OriginUse::Unused);
}

#[test]
fn devices_that_are_not_known_may_write() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    core.lost();
    assert_eq!(core.origin_use(), OriginUse::InUse);
    let mut out = Output::default();
    core.attached(at(1), true, &mut out);
    assert_eq!(
        core.origin_use(),
        OriginUse::InUse,
        "not all are identified"
    );
    core.greeted(at(2), &mut out);
    assert_eq!(core.origin_use(), OriginUse::Unused);
    core.absent(at(3), &mut out);
    assert_eq!(
        core.origin_use(),
        OriginUse::Unused,
        "without a module there are none"
    );
}
