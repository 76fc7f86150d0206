from __future__ import annotations

from quantkit.kernels.sass import PIPES, instructions, loops, main_loop

# Written by hand in the form of nvdisasm: a loop around a loop, and code before and after.
NESTED = """\
\t.headerflags\t@"EF_CUDA_SM80"
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/              @!P0 LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
        /*0050*/                   LDGSTS.E [R8], [R2.64], P1 ;
        /*0060*/                   LOP3.LUT R5, R4, 0xf000f, RZ, 0xc0, !PT ;
        /*0070*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0080*/                   LDG.E.U16 R9, [R2.64] ;
        /*0090*/                   I2F.U16 R9, R9 ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/                   FADD R0, R0, R1 ;
        /*00d0*/               @P1 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""


def test_instructions_have_guards_opcodes_and_operands() -> None:
    found, labels = instructions(NESTED)
    assert len(found) == 17
    assert labels == {".L_x_1": 1, ".L_x_2": 2, ".L_x_3": 15}
    copy = found[4]
    assert (copy.guard, copy.opcode, copy.name, copy.width) == ("!P0", "LDGSTS.E.BYPASS.128", "LDGSTS", 16)
    assert found[3].never_runs
    assert not copy.never_runs


def test_loops_end_at_their_branches_and_the_idle_one_at_the_end_is_none() -> None:
    assert [(loop.start, loop.stop) for loop in loops(NESTED)] == [(2, 12), (1, 14)]


def test_the_main_loop_is_the_inner_one() -> None:
    loop = main_loop(NESTED)
    assert loop is not None
    assert len(loop.body) == 10
    assert loop.copies() == {16: 1, 4: 1}
    assert [load.opcode for load in loop.exposed_loads()] == ["LDG.E.U16"]
    assert loop.exposed_loads()[0].width == 2
    assert loop.shared_bytes() == 16  # one LDSM of four matrices; the guarded LDS never runs
    assert loop.counts()["LDGSTS.E"] == 1


def test_pipes() -> None:
    loop = main_loop(NESTED)
    assert loop is not None
    pipes = loop.pipes()
    assert tuple(pipes) == PIPES
    assert pipes == {
        **dict.fromkeys(PIPES, 1), "fma": 0, "shared": 2, "global": 3, "other": 0
    }  # fmt: skip
    assert sum(pipes.values()) == len(loop.body)


def test_of_two_inner_loops_the_one_with_products_is_main() -> None:
    short = "        /*0010*/ FADD R0, R0, R1 ;\n" * 9
    text = (
        f".L_x_1:\n{short}        /*0020*/ @P0 BRA `(.L_x_1) ;\n"
        ".L_x_2:\n        /*0030*/ HMMA.16816.F32 R8, R4, R6, R8 ;\n        /*0040*/ @P0 BRA `(.L_x_2) ;\n"
    )
    loop = main_loop(text)
    assert loop is not None
    assert len(loop.body) == 2
    assert main_loop(short) is None
