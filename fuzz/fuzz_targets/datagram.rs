#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    potluck_core::wire::check::datagram(input);
});
