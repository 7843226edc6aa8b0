"""Regular word forms of ten languages, as stems and patterns ('*' is the stem); a to z only, accents left out.

Verbs, of Finnish nouns without gradation: the forms that any grammar lists.
"""

LANGUAGES = {
    "spanish": (
        "habl cant trabaj camin compr mir llam llev dej pas quit tom us gan cort salt lav ayud bail cambi cocin "
        "contest descans escuch esper estudi grit intent limpi mand nad par pint prepar regres respet termin viaj "
        "visit",
        "*ar *o *as *a *amos *ais *an *e *aste *asteis *aron *aba *abas *abamos *aban *are *aras *ara *aremos "
        "*aran *aria *arias *ariamos *arian *ando *ado *ada *es *en *emos",
    ),
    "italian": (
        "parl cant lavor cammin compr guard port pens trov aspett ascolt aiut chiam lav salt us entr torn ball "
        "disegn prepar impar abit visit am arriv cerc cucin dimentic domand gir guid incontr invit salv suon tagli "
        "vol",
        "*are *o *a *ate *ano *ai *asti *ammo *aste *arono *avo *avi *ava *avamo *avate *avano *ando *ato *ata "
        "*ati *assi *asse *assero *iamo *ino",
    ),
    "portuguese": (
        "fal cant trabalh caminh compr olh lev deix pass tom us ganh cort salt lav ajud and esper estud fech gost "
        "gast mor mud nad par pens tir viaj visit acord chor convers danc empurr jant limp nam pint respir",
        "*ar *o *as *a *amos *ais *am *ei *aste *ou *astes *aram *ava *avas *avamos *avam *arei *aras *ara *aremos "
        "*arao *aria *arias *ariamos *ariam *ando *ado *ada *e *es *em",
    ),
    "french": (
        "parl chant travaill march port pens trouv aid aim donn ferm gard habit jou lav mont montr pass pleur pos "
        "prepar rest saut tomb tourn visit cherch coup dans demand ecout entr etudi laiss parl regard respir vol",
        "*er *e *es *ons *ez *ent *ai *as *a *ames *ates *erent *ais *ait *ions *iez *aient *erai *eras *era "
        "*erons *erez *eront *erais *erait *erions *eraient *ant *ee",
    ),
    "german": (
        "sag mach spiel lern kauf frag such brauch wohn hol lieb leb lach wein koch tanz hoff glaub zeig stell leg "
        "dank fehl fuhl hor kehr pflanz schenk stark teil wahl zahl bau dreh jag klag merk pack plan spar",
        "*en *e *st *t *te *test *ten *tet *end *ende *enden *endes ge*t ge*te ge*ten ge*tes ver*en ver*t er*en er*t",
    ),
    "latin": (
        "am laud voc port par pugn narr put rog serv spect cant clam cogit cur demonstr labor lav nat neg numer "
        "nunti oppugn orn liber mut memor monstr occup accus aedific ambul celebr cre err exspect habit invit "
        "iudic",
        "*are *o *as *at *amus *atis *ant *abam *abas *abat *abamus *abatis *abant *abo *abis *abit *abimus "
        "*abitis *abunt *avi *avisti *avit *avimus *averunt *ans *atus *ata *atum *or *atur *antur",
    ),
    "esperanto": (
        "am far ir ven vid dir don hav labor leg lern lud mang parol pens port skrib stud trov uz vek viv vojag "
        "dorm kant kur send atend help kompren bezon pag pet rid sid star batal danc desegn flug gvid kolekt",
        "*i *as *is *os *us *u *anta *inta *onta *ata *ita *ota *ante *ado *anto *antoj mal*i re*i re*as ek*is",
    ),
    "finnish": (
        "kala koira muna kuva sana asia talo valo puro koulu joulu laulu sauna savu suru taulu viulu rauha jono "
        "juna karhu kirja laiva loma luola marja maja nauru paja piha raha saha sumu tarha voima kiva kana",
        "* *n *a *ssa *sta *lla *lta *lle *na *ksi *t *tta *ni *si *mme *nne *kin *ko *ssani *ssasi *lleni *stamme",
    ),
    "swedish": (
        "tal arbet kall oppn stann svar spel titt frag tack prat hopp kast dans hamt mal skick saml bad nick vant "
        "andr vand stad plock sim knack tvatt vil ordn blund skap klapp jag hitt lov duk handl regn vakn",
        "*a *ar *ade *at *ande *as *ades *ats *are *aren *arna *an *andet *ad upp*a upp*ar ut*a ut*ade",
    ),
    "swahili": (
        "soma penda imba cheza andika tazama fanya pika saidia funga fungua nunua uza tembea kimbia lima jenga "
        "leta peleka ongea sema ona pata tafuta uliza beba piga amka anza cheka fika kaa lala ngoja nywa osha "
        "panda rudi",
        "ku* nina* una* ana* tuna* mna* wana* nili* uli* ali* tuli* mli* wali* nita* uta* ata* tuta* mta* wata* "
        "nime* ume* ame* tume* mme* wame*",
    ),
}


def words(language):
    """Sorted distinct word forms of a language."""
    stems, patterns = (text.split() for text in LANGUAGES[language])
    return sorted({pattern.replace("*", stem) for stem in stems for pattern in patterns})
