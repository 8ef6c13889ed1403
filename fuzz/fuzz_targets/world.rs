#![no_main]
libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    potluck_core::sim::whole_world::scripted(script);
});
